// The command that watches topics.

package cli

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json/jsontext"
	"encoding/json/v2"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/fatih/color"
	"github.com/spf13/cobra"
	"github.com/tmaxmax/go-sse"

	"herald/notify"
)

func (c *client) tailCommand() *cobra.Command {
	t := &tail{client: c, positions: map[string]string{}}
	command := &cobra.Command{
		Use:   "tail TOPIC…",
		Short: "Print messages as they come",
		Long: `Print messages as they come, as one line of JSON per message: {"id", "topic", "epoch", "seq", "time", "from", "data"}.

It reconnects by itself. If the topic's channel has history, messages sent in the meantime are printed then;
otherwise they are missing.`,
		Example: `  herald notify tail chat/42 | jq .data
  herald notify tail orders --rewind 20 --pretty`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(command *cobra.Command, args []string) error {
			if slices.ContainsFunc(args, func(topic string) bool { return strings.TrimSpace(topic) == "" || strings.Contains(topic, "?") }) {
				return exitWith(exitUsage, "a topic must not be empty or contain \"?\"")
			}
			if _, err := notify.ParseStart(t.since, t.rewind); err != nil {
				return &ExitError{exitUsage, err}
			}
			ctx, stop := signal.NotifyContext(command.Context(), syscall.SIGINT, syscall.SIGTERM)
			defer stop()
			t.topics, t.out = args, command.OutOrStdout()
			return t.run(ctx)
		},
	}
	flags := command.Flags()
	flags.StringVar(&t.since, "since", "", "begin after this position, EPOCH:SEQ")
	flags.StringVar(&t.rewind, "rewind", "", "begin with the last messages: a number, or a maximum age such as 2m")
	flags.BoolVar(&t.pretty, "pretty", false, "print in readable form, with colours on a terminal")
	return command
}

// tail is one run of the command.
type tail struct {
	*client
	topics        []string
	since, rewind string
	pretty        bool
	out           io.Writer

	positions map[string]string // of the last message, by topic
	silent    int               // connections in a row on which no beat came
}

// errOutput says that the output no longer has a reader.
var errOutput = errors.New("the output is closed")

// run watches until ctx is done. If the server does not answer at first, that is an error; later
// run waits for it.
func (t *tail) run(ctx context.Context) error {
	wait := time.Duration(0)
	for connected := false; ; {
		began := time.Now()
		err := t.watch(ctx, func() { connected = true })
		var exit *ExitError
		switch {
		case ctx.Err() != nil:
			return nil // Ctrl-C
		case errors.Is(err, errOutput):
			return nil // as with "| head"
		case !connected, errors.As(err, &exit) && exit.Code != exitUnreachable && !errors.Is(err, errNotNow):
			return err
		}
		if errors.Is(err, errNoBeats) {
			t.silent = min(t.silent+1, 8) // until a beat comes: a client that the application has wrapped gets none
		}
		if wait = min(2*wait+200*time.Millisecond, 5*time.Second); time.Since(began) > 10*time.Second {
			wait = 0
		}
		fmt.Fprintf(os.Stderr, "herald: disconnected (%v), reconnecting\n", err)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
	}
}

// firstBeatWithin is the maximum time from the start of a connection to its first beat. A
// connection without beats is dead, although nobody has closed it.
const firstBeatWithin = 15 * time.Second

var errNoBeats = errors.New("nothing arrives any more")

// beatsWithin returns the maximum time from one beat to the next; 0 means never.
func beatsWithin(data string) time.Duration {
	var beat struct {
		Every float64 `json:"every"`
	}
	if err := json.Unmarshal([]byte(data), &beat); err != nil {
		return 0
	}
	return time.Duration(2.5 * beat.Every * float64(time.Second))
}

// watch prints what arrives on one connection. It returns when the connection ends.
func (t *tail) watch(ctx context.Context, connected func()) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	beats := time.AfterFunc(firstBeatWithin<<t.silent, func() { cancel(errNoBeats) })
	defer beats.Stop()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimSuffix(t.url, "/")+"/api/realtime", nil)
	if err != nil {
		return &ExitError{exitUsage, err}
	}
	response, err := httpClient.Do(request)
	if err != nil {
		return exitWith(exitUnreachable, "no server answers: %w", err)
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		content, _ := io.ReadAll(response.Body)
		return refusal(response.StatusCode, content)
	}
	keys := map[string]string{} // topics by subscription key
	for event, err := range sse.Read(response.Body, &sse.ReadConfig{MaxEventSize: 64 << 20}) {
		if err != nil {
			return exitWith(exitUnreachable, "%w", cmp.Or(context.Cause(ctx), err))
		}
		if event.Type == "PB_CONNECT" {
			subscriptions := []string{notify.BeatTopic}
			for _, topic := range t.topics {
				if err := t.findPosition(ctx, topic); err != nil {
					return err
				}
				key := t.key(topic)
				keys[key] = topic
				subscriptions = append(subscriptions, key)
			}
			subscribe := func() error {
				_, err := t.request(ctx, http.MethodPost, "/api/realtime", map[string]any{"clientId": event.LastEventID, "subscriptions": subscriptions})
				return err
			}
			if err := subscribe(); err != nil {
				return err
			}
			connected()
			if t.givenToken() == "" {
				go t.stayIn(ctx, subscribe)
			}
			continue
		}
		if event.Type == notify.BeatTopic {
			beats.Stop()
			t.silent = 0
			if within := beatsWithin(event.Data); within > 0 {
				beats.Reset(within)
			}
			continue
		}
		if topic, ok := keys[event.Type]; ok {
			if err := t.print(topic, event.Data); err != nil {
				return fmt.Errorf("%w: %w", errOutput, err)
			}
		}
	}
	return exitWith(exitUnreachable, "the server closed the connection")
}

// stayIn renews the subscriptions until ctx is done, each time before the last token expires.
// Otherwise the server would close the connection, and messages sent before the next one would be
// lost without history. Errors are ignored, because they also show on the connection.
func (c *client) stayIn(ctx context.Context, subscribe func() error) {
	ticker := time.NewTicker(c.tokenLasts / 3) // a token is used for half of its lifetime
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
			_ = subscribe()
		}
	}
}

// findPosition records the current position of a topic with history, so that nothing before the
// first message is missed. It does nothing if the position is known or the subscription begins
// elsewhere.
func (t *tail) findPosition(ctx context.Context, topic string) error {
	if t.positions[topic] != "" || t.since != "" || t.rewind != "" || strings.HasPrefix(topic, "@") {
		return nil
	}
	content, err := t.request(ctx, http.MethodGet, "/api/notify/history?limit=1&topic="+url.QueryEscape(topic), nil)
	var exit *ExitError
	if errors.As(err, &exit) && exit.Code == exitRefused && !errors.Is(err, errNotNow) {
		return nil // a topic of record events
	}
	if err != nil {
		return err
	}
	var page notify.HistoryPage
	if err := json.Unmarshal(content, &page); err != nil || page.Items == nil {
		return exitWith(exitUnreachable, "the server that answers is not Herald: the answer is not a page of the history")
	}
	if page.Epoch != "" {
		t.positions[topic] = notify.Position{Epoch: page.Epoch, Seq: page.Head}.String()
	}
	return nil
}

// key returns the subscription key of topic. It continues after the last position, if that is
// known.
func (t *tail) key(topic string) string {
	query := map[string]string{"envelope": "true", "visible": "false"} // who looks is not among those who are present
	switch position := t.positions[topic]; {
	case position != "":
		query["since"] = position
	case t.since != "":
		query["since"] = t.since
	case t.rewind != "":
		query["rewind"] = t.rewind
	}
	options, err := json.Marshal(map[string]any{"query": query}, json.Deterministic(true))
	if err != nil {
		return topic
	}
	return topic + "?options=" + url.QueryEscape(string(options))
}

// tailMessage is the printed part of an envelope.
type tailMessage struct {
	Topic string         `json:"topic"`
	Epoch string         `json:"epoch"`
	Seq   int64          `json:"seq"`
	Time  string         `json:"time"`
	From  string         `json:"from"`
	Data  jsontext.Value `json:"data"`
	Gap   bool           `json:"gap"`
}

// print prints a message and records its position.
func (t *tail) print(topic, text string) error {
	var message tailMessage
	if err := json.Unmarshal([]byte(text), &message); err != nil {
		_, err := fmt.Fprintln(t.out, text) // a record event
		return err
	}
	if message.Epoch != "" {
		t.positions[topic] = notify.Position{Epoch: message.Epoch, Seq: message.Seq}.String()
	}
	if !t.pretty {
		_, err := fmt.Fprintln(t.out, text)
		return err
	}
	var line bytes.Buffer
	at, err := time.Parse("2006-01-02 15:04:05.000Z", message.Time)
	if err == nil {
		line.WriteString(color.HiBlackString("%s", at.Local().Format("15:04:05.000")) + " ")
	}
	line.WriteString(color.CyanString("%s", printable(message.Topic)))
	if message.Seq > 0 {
		line.WriteString(color.HiBlackString(" #%d", message.Seq))
	}
	if message.Gap {
		line.WriteString(color.RedString(" (earlier messages are missing)"))
	}
	if message.From != "" {
		line.WriteString(" " + color.YellowString("%s", printable(message.From)))
	}
	_, err = fmt.Fprintf(t.out, "%s %s\n", line.String(), printable(string(message.Data)))
	return err
}
