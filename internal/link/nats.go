// The NATS subjects, the connection to the server, and the handshake.

package link

import (
	"context"
	"encoding/json/v2"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"regexp"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
)

// Subjects are the subjects of an application. Topics never appear in them.
//
// An edge publishes to its own hello and up, and listens to its own down and inbox and to the beat. So a
// NATS server with accounts can make sure that no edge speaks for another one, or as the origin.
type Subjects struct{ App string }

func (s Subjects) edge(name, what string) string {
	return "herald." + s.App + ".edge." + name + "." + what
}

// Hello is where an edge requests a session.
func (s Subjects) Hello(edge string) string { return s.edge(edge, "hello") }

// Up is where packets of an edge go.
func (s Subjects) Up(edge string) string { return s.edge(edge, "up") }

// Down is where packets for an edge go.
func (s Subjects) Down(edge string) string { return s.edge(edge, "down") }

// Inbox is the prefix of where answers to an edge go.
func (s Subjects) Inbox(edge string) string { return s.edge(edge, "inbox") }

// Beat is where the origin says that it is there: see [Beat].
func (s Subjects) Beat() string { return "herald." + s.App + ".beat" }

// EdgeOf returns the edge of a subject of [Subjects.Hello] or [Subjects.Up].
func EdgeOf(subject string) string {
	parts := strings.Split(subject, ".")
	if len(parts) < 2 {
		return ""
	}
	return parts[len(parts)-2]
}

var nameForm = regexp.MustCompile(`^[A-Za-z0-9_-]{1,64}$`)

// CheckName returns an error unless name can be the name of what, an application or an edge.
func CheckName(what, name string) error {
	if !nameForm.MatchString(name) {
		return fmt.Errorf("the %s %q must have 1 to 64 letters, digits, - and _", what, name)
	}
	return nil
}

// Hello requests a session.
type Hello struct {
	Version int    `json:"version"`
	App     string `json:"app"`
	Boot    uint64 `json:"boot"` // of the edge's process
	Session uint64 `json:"session"`

	// The queue of a connection at the edge, in messages and bytes.
	QueueSize  int `json:"queueSize,omitzero"`
	QueueBytes int `json:"queueBytes,omitzero"`
}

// Welcome answers a [Hello].
type Welcome struct {
	Version int    `json:"version"`
	Boot    uint64 `json:"boot"`           // of the origin's process
	Error   string `json:"error,omitzero"` // why there is no session
	Again   bool   `json:"again,omitzero"` // the edge may try again
}

// Beat is what the origin says about once per second: its boot.
type Beat struct {
	Boot uint64 `json:"boot"`
}

// BeatEvery is how often the origin sends a [Beat].
const BeatEvery = time.Second

// Options say how to connect to NATS.
type Options struct {
	URL string // nats://…, tls://…; several with commas
	// Credentials is a file: user credentials (.creds), or the seed of an nkey.
	Credentials string
	Name        string // of the connection, for NATS' own monitoring
	Inbox       string // prefix of where answers go; a default if empty
	Logger      *slog.Logger
}

// Connect connects to NATS, and again whenever the connection is lost. It does not wait for the server.
func Connect(o Options) (*nats.Conn, error) {
	options := []nats.Option{
		nats.Name(o.Name),
		nats.Timeout(2 * time.Second),
		nats.RetryOnFailedConnect(true),
		nats.MaxReconnects(-1),
		nats.ReconnectWait(500 * time.Millisecond),
		// Streams send again what is lost. What would wait here would only come late.
		nats.ReconnectBufSize(-1),
		nats.PingInterval(2 * time.Second),
		nats.MaxPingsOutstanding(2),
		nats.FlusherTimeout(5 * time.Second),
		nats.DisconnectErrHandler(func(_ *nats.Conn, err error) {
			if err != nil {
				o.Logger.Warn("The connection to NATS is lost", slog.String("error", err.Error()))
			}
		}),
		nats.ReconnectHandler(func(nc *nats.Conn) {
			o.Logger.Info("Connected to NATS again", slog.String("server", nc.ConnectedAddr()))
		}),
		nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) {
			if errors.Is(err, nats.ErrSlowConsumer) {
				return // what was dropped is sent again
			}
			o.Logger.Error("NATS reports an error", slog.String("error", err.Error()))
		}),
	}
	if o.Inbox != "" {
		options = append(options, nats.CustomInboxPrefix(o.Inbox))
	}
	if o.Credentials != "" {
		option, err := credentials(o.Credentials)
		if err != nil {
			return nil, err
		}
		options = append(options, option)
	}
	nc, err := nats.Connect(o.URL, options...)
	if err != nil {
		return nil, fmt.Errorf("connect to NATS: %w", err)
	}
	if !nc.IsConnected() {
		o.Logger.Warn(Unreachable(nc))
	}
	return nc, nil
}

// Unreachable says that the servers of nc cannot be reached yet.
func Unreachable(nc *nats.Conn) string {
	return fmt.Sprintf("NATS cannot be reached yet, and is tried again until it can: %s", strings.Join(nc.Servers(), ", "))
}

// ConfigFor returns a configuration whose packets are no larger than what the NATS server accepts.
func ConfigFor(nc *nats.Conn) Config {
	config := Config{}.withDefaults()
	if limit := int(nc.MaxPayload()); limit > 0 { // known once it was connected
		config.MaxPacket = max(2*headerSize, min(config.MaxPacket, limit))
	}
	return config
}

func credentials(file string) (nats.Option, error) {
	content, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("read the NATS credentials: %w", err)
	}
	if strings.Contains(string(content), "BEGIN NATS USER JWT") {
		return nats.UserCredentials(file), nil
	}
	option, err := nats.NkeyOptionFromSeed(file)
	if err != nil {
		return nil, fmt.Errorf("read the NATS credentials: %s has neither credentials nor the seed of an nkey: %w", file, err)
	}
	return option, nil
}

// maxWaiting is how many bytes of packets may wait to be taken. What is dropped is sent again.
const maxWaiting = 64 << 20

// Subscribe calls receive for what comes to a subject, one message at a time.
func Subscribe(nc *nats.Conn, subject string, receive nats.MsgHandler) error {
	subscription, err := nc.Subscribe(subject, receive)
	if err == nil {
		err = subscription.SetPendingLimits(-1, maxWaiting)
	}
	if err != nil {
		return fmt.Errorf("subscribe to %s: %w", subject, err)
	}
	return nil
}

// Publish publishes value as JSON.
func Publish(nc *nats.Conn, subject string, value any) error {
	encoded, err := json.Marshal(value)
	if err != nil {
		return fmt.Errorf("encode for %s: %w", subject, err)
	}
	return nc.Publish(subject, encoded)
}

// Errors of [Greet].
var (
	// ErrNoOrigin means that nobody answers.
	ErrNoOrigin = errors.New("no origin answers")
	// ErrRefused means that the origin will not accept the edge.
	ErrRefused = errors.New("the origin refuses this edge")
)

// Greet requests a session for edge. The error is [ErrNoOrigin] or [ErrRefused], or can be tried again.
func Greet(nc *nats.Conn, subjects Subjects, edge string, hello Hello) (Welcome, error) {
	encoded, err := json.Marshal(hello)
	if err != nil {
		return Welcome{}, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	// what was requested of a server that is gone gets no answer
	lost := nc.StatusChanged(nats.DISCONNECTED, nats.RECONNECTING, nats.CLOSED)
	defer nc.RemoveStatusListener(lost)
	go func() {
		select {
		case <-lost:
			cancel()
		case <-ctx.Done():
		}
	}()
	answer, err := nc.RequestWithContext(ctx, subjects.Hello(edge), encoded)
	switch {
	case errors.Is(err, nats.ErrNoResponders), errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		return Welcome{}, fmt.Errorf("%w for the application %q", ErrNoOrigin, subjects.App)
	case err != nil:
		return Welcome{}, err
	}
	var welcome Welcome
	if err := json.Unmarshal(answer.Data, &welcome); err != nil {
		return Welcome{}, fmt.Errorf("the origin's answer: %w", err)
	}
	switch {
	case welcome.Error == "":
		return welcome, nil
	case welcome.Again:
		return Welcome{}, errors.New(welcome.Error)
	}
	return Welcome{}, fmt.Errorf("%w: %s", ErrRefused, welcome.Error)
}
