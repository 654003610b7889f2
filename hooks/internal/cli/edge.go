// The command "herald edge", a process that holds realtime connections for a server.

package cli

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"regexp"
	"strings"
	"time"

	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/hook"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/spf13/cobra"

	"herald/internal/link"
	"herald/notify"
	"herald/notify/edge"
	"herald/notify/origin"
)

// edgeOptions are the flags of "edge".
type edgeOptions struct {
	edge.Config
	http, metrics string
}

func edgeCommand(app core.App, root *cobra.Command) *cobra.Command {
	var o edgeOptions
	command := &cobra.Command{
		Use:   "edge",
		Short: "Hold realtime connections for a server that runs elsewhere",
		Long: `Hold realtime connections for a server that runs elsewhere, the origin. An edge has no database.

The origin is started with --notifyNATS. The edge joins it over the same NATS server. Clients use the
edge's address as they would use the origin's: what is not about realtime connections goes on to
--origin. When the origin restarts, the clients of its edges stay connected.

Exit codes: 0 success, 1 refused by the origin, 2 wrong arguments.`,
		Example: `  herald serve --notifyNATS embedded://127.0.0.1:4222
  herald edge --nats nats://127.0.0.1:4222 --origin http://127.0.0.1:8090 --http 127.0.0.1:8091`,
		Args:         cobra.NoArgs,
		SilenceUsage: true,
	}
	flags := command.Flags()
	flags.StringVar(&o.NATS, "nats", "", "the address of the NATS server, nats://HOST:PORT (several with commas)")
	flags.StringVar(&o.Credentials, "natsCreds", "", "a file with NATS user credentials, or the seed of an nkey")
	flags.StringVar(&o.Origin, "origin", "", "the origin's address, http://HOST:PORT, for requests that are not about realtime connections")
	flags.StringVar(&o.http, "http", "127.0.0.1:8091", "the address to listen on")
	flags.StringVar(&o.metrics, "metrics", "", "an address for /metrics, for Prometheus; none if not given")
	flags.StringVar(&o.App, "app", origin.DefaultApp, "the name of the application on the NATS server, see --notifyApp of the origin")
	flags.StringVar(&o.Name, "name", "", "the name of this edge, which no other has (default: the machine's, with the port)")
	flags.BoolVar(&o.TrustProxy, "trustProxy", false, "pass on the X-Forwarded-For of a proxy, through which alone clients reach the edge")
	flags.IntVar(&o.QueueSize, "queueSize", notify.DefaultQueueSize, "how many messages may wait for a connection before it is closed")
	flags.IntVar(&o.QueueBytes, "queueBytes", notify.DefaultQueueBytes, "how many bytes may wait for a connection before it is closed")
	flags.DurationVar(&o.Heartbeat, "heartbeat", notify.DefaultHeartbeat, "how long a connection may be idle before it gets a comment line")
	flags.DurationVar(&o.Patience, "patience", time.Minute, "how long connections are kept without an origin")
	command.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return &ExitError{exitUsage, err} })
	command.PreRunE = func(command *cobra.Command, _ []string) error {
		if err := noEmptyFlags(command); err != nil {
			return &ExitError{exitUsage, err}
		}
		return o.check()
	}
	command.RunE = func(command *cobra.Command, _ []string) error { return o.run(app, command) }
	hideServerFlags(root, command)
	return command
}

// check refuses wrong flags, and fills in the name.
func (o *edgeOptions) check() error {
	switch {
	case o.NATS == "":
		return exitWith(exitUsage, "--nats is missing: the address of the NATS server over which the edge joins its origin")
	case o.QueueSize < 1, o.QueueBytes < 1:
		return exitWith(exitUsage, "--queueSize and --queueBytes must be at least 1")
	case o.Heartbeat <= 0, o.Patience <= 0:
		return exitWith(exitUsage, "--heartbeat and --patience must be durations such as 25s")
	}
	host, port, err := net.SplitHostPort(o.http)
	if err != nil {
		return exitWith(exitUsage, "--http %q is not an address such as 127.0.0.1:8091", o.http)
	}
	if o.Name == "" {
		if name, err := os.Hostname(); err == nil {
			host = name
		}
		o.Name = strings.Trim(regexp.MustCompile(`[^A-Za-z0-9_-]+`).ReplaceAllString(host+"-"+port, "-"), "-")
	}
	for what, name := range map[string]string{"--name": o.Name, "--app": o.App} {
		if err := link.CheckName(what, name); err != nil {
			return &ExitError{exitUsage, err}
		}
	}
	return nil
}

// run serves until the process is to end.
func (o *edgeOptions) run(app core.App, command *cobra.Command) error {
	o.Logger = slog.New(slog.NewTextHandler(os.Stderr, nil)) // PocketBase discards what goes to the command's own
	made, err := edge.New(o.Config)
	if err != nil {
		return &ExitError{exitUsage, err}
	}
	listener, err := net.Listen("tcp", o.http)
	if err != nil {
		return exitWith(exitRefused, "listen: %w", err)
	}
	server := &http.Server{Handler: made, ConnContext: notify.ConnContext, ReadHeaderTimeout: time.Minute, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 64 << 10, ErrorLog: slog.NewLogLogger(o.Logger.Handler(), slog.LevelWarn)}
	metrics, err := o.serveMetrics(made)
	if err != nil {
		listener.Close()
		return err
	}
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	stopped := make(chan struct{})
	defer close(stopped)
	// PocketBase handles the signals
	app.OnTerminate().Bind(&hook.Handler[*core.TerminateEvent]{
		Id: "heraldEdge",
		Func: func(e *core.TerminateEvent) error {
			stop()
			<-stopped
			return e.Next()
		},
	})
	fmt.Fprintf(command.OutOrStdout(), "Edge %q of %q serves http://%s\n", o.Name, o.App, listener.Addr())
	serving := make(chan error, 1)
	go func() {
		err := server.Serve(listener)
		if !errors.Is(err, http.ErrServerClosed) {
			stop()
		}
		serving <- err
	}()
	err = made.Run(ctx)
	server.Close()
	if metrics != nil {
		metrics.Close()
	}
	if served := <-serving; err == nil && !errors.Is(served, http.ErrServerClosed) {
		err = served
	}
	if err != nil {
		return &ExitError{exitRefused, err}
	}
	return nil
}

// serveMetrics serves the edge's numbers for Prometheus, if it is to.
func (o *edgeOptions) serveMetrics(made *edge.Edge) (*http.Server, error) {
	if o.metrics == "" {
		return nil, nil
	}
	listener, err := net.Listen("tcp", o.metrics)
	if err != nil {
		return nil, exitWith(exitRefused, "listen for metrics: %w", err)
	}
	registry := prometheus.NewRegistry()
	gauge := func(name, help string, value func(edge.Stats) float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "herald_edge_" + name, Help: help}, func() float64 { return value(made.Stats()) })
	}
	registry.MustRegister(
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		gauge("connections", "Open realtime connections.", func(s edge.Stats) float64 { return float64(s.Connections) }),
		gauge("connections_taken", "Open realtime connections that are written to without net/http.", func(s edge.Stats) float64 { return float64(s.Taken) }),
		gauge("queued_messages", "Messages waiting to be written.", func(s edge.Stats) float64 { return float64(s.QueuedMessages) }),
		gauge("queued_bytes", "Bytes waiting to be written.", func(s edge.Stats) float64 { return float64(s.QueuedBytes) }),
		gauge("link_bytes", "Bytes on the way to the origin.", func(s edge.Stats) float64 { return float64(s.OnTheWay) }),
		gauge("joined", "1 if the edge has joined its origin.", func(s edge.Stats) float64 {
			if s.Joined {
				return 1
			}
			return 0
		}),
		prometheus.NewCounterFunc(prometheus.CounterOpts{Name: "herald_edge_written_bytes_total", Help: "Bytes written to connections."},
			func() float64 { return float64(made.Stats().Bytes) }),
	)
	server := &http.Server{Handler: promhttp.HandlerFor(registry, promhttp.HandlerOpts{}), ReadHeaderTimeout: time.Minute}
	go func() { _ = server.Serve(listener) }() // until it is closed
	return server, nil
}
