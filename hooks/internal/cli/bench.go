// The command that measures a running server.

package cli

import (
	"context"
	"encoding/json/v2"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/pocketbase/pocketbase/tools/security"
	"github.com/spf13/cobra"
	"github.com/tmaxmax/go-sse"
)

// benchPatience is how long to wait for the last deliveries.
const benchPatience = 10 * time.Second

func (c *client) benchCommand() *cobra.Command {
	b := &benchmark{client: c}
	command := &cobra.Command{
		Use:   "bench",
		Short: "Measure a running server",
		Long: `Measure a running server: connect clients to the benchmark's own topic, and send messages to all of them.
First one at a time, for the latency; then as fast as the server answers, for the rate.

If the server runs on the same machine, both share its CPUs. Each client takes one file descriptor here and one on the server.`,
		Args: cobra.NoArgs,
		RunE: func(command *cobra.Command, _ []string) error {
			if b.Clients < 1 || b.Messages < 1 || b.size < 1 || b.Senders < 1 {
				return exitWith(exitUsage, "clients, messages, size and senders must be at least 1")
			}
			ctx, stop := signal.NotifyContext(command.Context(), syscall.SIGINT, syscall.SIGTERM)
			defer stop()
			err := b.run(ctx)
			if ctx.Err() != nil {
				return nil // Ctrl-C
			}
			if err != nil {
				return err
			}
			return b.report(command.OutOrStdout())
		},
	}
	flags := command.Flags()
	flags.IntVar(&b.Clients, "clients", 100, "how many clients to connect")
	flags.IntVar(&b.Messages, "messages", 200, "how many messages to send in each of the two phases")
	flags.IntVar(&b.size, "size", 100, "bytes of data in a message")
	flags.IntVar(&b.Senders, "senders", 8, "how many senders to use at the same time, for the rate")
	flags.StringVar(&b.prefix, "topic", "bench", "the topic, to which a random part is added; to measure history, use a topic of a channel with history")
	flags.BoolVar(&b.asJSON, "json", false, "print JSON")
	return command
}

// benchmark is one run of the command, and its results. Durations are in milliseconds.
type benchmark struct {
	*client `json:"-"`
	size    int
	prefix  string
	asJSON  bool

	Clients  int `json:"clients"`
	Messages int `json:"messages"`
	Senders  int `json:"senders"`

	ConnectSeconds float64 `json:"connectSeconds"`
	P50            float64 `json:"p50"` // latency of a delivery
	P95            float64 `json:"p95"`
	P99            float64 `json:"p99"`
	MessagesRate   float64 `json:"messagesPerSecond"`
	DeliveriesRate float64 `json:"deliveriesPerSecond"`
	Lost           int64   `json:"lost"`

	topic    string
	received atomic.Int64
	mu       sync.Mutex // guards latencies
	latency  []time.Duration
}

func (b *benchmark) run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	b.topic = b.prefix + "/" + security.RandomString(10)

	start := time.Now()
	var clients sync.WaitGroup
	defer clients.Wait()
	defer cancel()
	subscribed := make(chan error, b.Clients)
	slots := make(chan struct{}, 32) // limits concurrent connection attempts
	for range b.Clients {
		clients.Go(func() {
			slots <- struct{}{}
			b.listen(ctx, func(err error) {
				<-slots
				subscribed <- err
			})
		})
	}
	bar := newProgress("connecting", b.Clients)
	for range b.Clients {
		select {
		case err := <-subscribed:
			if err != nil {
				return err
			}
		case <-ctx.Done():
			return ctx.Err()
		}
		bar.step()
	}
	bar.done()
	b.ConnectSeconds = time.Since(start).Seconds()

	bar = newProgress("one at a time", b.Messages)
	for i := range b.Messages {
		if err := b.send(ctx); err != nil {
			return err
		}
		b.await(ctx, int64((i+1)*b.Clients))
		bar.step()
	}
	bar.done()
	b.mu.Lock()
	slices.Sort(b.latency)
	percentile := func(p int) float64 {
		if len(b.latency) == 0 {
			return 0
		}
		return float64(b.latency[(len(b.latency)-1)*p/100].Microseconds()) / 1000
	}
	b.P50, b.P95, b.P99 = percentile(50), percentile(95), percentile(99)
	b.mu.Unlock()

	bar = newProgress("at once", b.Messages)
	start = time.Now()
	before := b.received.Load()
	var left atomic.Int64
	left.Store(int64(b.Messages))
	failed := make(chan error, b.Senders)
	var senders sync.WaitGroup
	for range b.Senders {
		senders.Go(func() {
			for left.Add(-1) >= 0 {
				if err := b.send(ctx); err != nil {
					failed <- err
					return
				}
				bar.step()
			}
		})
	}
	senders.Wait()
	b.MessagesRate = float64(b.Messages) / time.Since(start).Seconds()
	select {
	case err := <-failed:
		return err
	default:
	}
	want := before + int64(b.Messages*b.Clients)
	b.await(ctx, want)
	bar.done()
	b.DeliveriesRate = float64(b.received.Load()-before) / time.Since(start).Seconds()
	b.Lost = int64(2*b.Messages*b.Clients) - b.received.Load()
	return ctx.Err()
}

func (b *benchmark) send(ctx context.Context) error {
	_, err := b.request(ctx, http.MethodPost, "/api/notify", map[string]any{
		"topic": b.topic, "data": map[string]any{"at": fmt.Sprint(time.Now().UnixNano()), "x": strings.Repeat("x", b.size)},
	})
	return err
}

// await waits until the wanted number of deliveries has arrived, but not forever, since some may be
// lost.
func (b *benchmark) await(ctx context.Context, want int64) {
	last, since := int64(-1), time.Now()
	for ctx.Err() == nil {
		got := b.received.Load()
		if got >= want || got == last && time.Since(since) > benchPatience {
			return
		}
		if got != last {
			last, since = got, time.Now()
		}
		time.Sleep(100 * time.Microsecond)
	}
}

// listen is one client. subscribed is called once.
func (b *benchmark) listen(ctx context.Context, subscribed func(error)) {
	told := false
	tell := func(err error) {
		if !told {
			told = true
			subscribed(err)
		}
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimSuffix(b.url, "/")+"/api/realtime", nil)
	if err != nil {
		tell(&ExitError{exitUsage, err})
		return
	}
	response, err := httpClient.Do(request)
	if err != nil {
		tell(exitWith(exitUnreachable, "no server answers: %w", err))
		return
	}
	defer response.Body.Close()
	for event, err := range sse.Read(response.Body, &sse.ReadConfig{MaxEventSize: 64 << 20}) {
		switch {
		case err != nil:
			tell(exitWith(exitUnreachable, "%w", err))
			return
		case event.Type == "PB_CONNECT":
			_, err := b.request(ctx, http.MethodPost, "/api/realtime", map[string]any{"clientId": event.LastEventID, "subscriptions": []string{b.topic}})
			tell(err)
			if err != nil {
				return
			}
		case event.Type == b.topic:
			var data struct {
				At int64 `json:"at,string"`
			}
			if err := json.Unmarshal([]byte(event.Data), &data); err == nil {
				b.mu.Lock()
				b.latency = append(b.latency, time.Duration(time.Now().UnixNano()-data.At))
				b.mu.Unlock()
			}
			b.received.Add(1)
		}
	}
	tell(exitWith(exitRefused, "the server refused the connection (%d)", response.StatusCode))
}

func (b *benchmark) report(out io.Writer) error {
	if b.asJSON {
		if err := json.MarshalWrite(out, b); err != nil {
			return err
		}
		fmt.Fprintln(out)
	} else {
		fmt.Fprintf(out, "%d clients connected in %.2f s\n", b.Clients, b.ConnectSeconds)
		fmt.Fprintf(out, "one message at a time: latency p50 %.2f ms, p95 %.2f ms, p99 %.2f ms\n", b.P50, b.P95, b.P99)
		fmt.Fprintf(out, "%d senders at once: %.0f messages per second, %.0f deliveries per second\n", b.Senders, b.MessagesRate, b.DeliveriesRate)
		fmt.Fprintf(out, "lost: %d of %d\n", b.Lost, 2*b.Messages*b.Clients)
	}
	if b.Lost > 0 {
		return exitWith(exitRefused, "%d deliveries were lost", b.Lost)
	}
	return nil
}

// progress is a progress bar on stderr, if that is a terminal.
type progress struct {
	name    string
	total   int
	shows   bool
	mu      sync.Mutex // guards the fields below
	count   int
	printed time.Time
}

func newProgress(name string, total int) *progress {
	info, err := os.Stderr.Stat()
	return &progress{name: name, total: total, shows: err == nil && info.Mode()&os.ModeCharDevice != 0}
}

func (p *progress) step() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.count++
	if p.shows && (p.count == p.total || time.Since(p.printed) > 50*time.Millisecond) {
		p.printed = time.Now()
		const width = 40
		filled := width * p.count / p.total
		fmt.Fprintf(os.Stderr, "\r%-14s [%s%s] %d/%d", p.name, strings.Repeat("=", filled), strings.Repeat(" ", width-filled), p.count, p.total)
	}
}

func (p *progress) done() {
	if p.shows {
		fmt.Fprint(os.Stderr, "\r\033[K") // the report follows
	}
}
