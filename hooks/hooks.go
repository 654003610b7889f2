// Package hooks binds the delivery engine (herald/notify) to a PocketBase
// application: its realtime connections, the /api/notify routes, the inbox and
// the web page.
package hooks

import (
	"cmp"
	"errors"
	"io/fs"
	"os"
	"time"

	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/plugins/jsvm"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"herald/hooks/internal/cli"
	"herald/hooks/internal/triggers"
	"herald/notify"
)

// Config holds the options of the plugin. The zero value works.
type Config struct {
	// Notify configures the engine.
	Notify notify.Config

	// Limits bound what clients may take of the server.
	Limits Limits

	// MetricsToken lets whoever sends it as a bearer token read
	// /api/notify/metrics. Defaults to the environment's HERALD_METRICS_TOKEN, and
	// where that is empty to superusers only.
	MetricsToken string

	// JS registers PocketBase's jsvm plugin (pb_hooks and JavaScript migrations) with
	// $notify and onNotifyPublish, instead of jsvm.MustRegister. Nil is without JavaScript.
	JS *jsvm.Config

	// Page is what is served at / when there is no PublicDir. Defaults to
	// nothing.
	Page fs.FS

	// PublicDir is a folder with static files to serve at / instead of Page,
	// if it exists or RequirePublicDir is set.
	PublicDir        string
	RequirePublicDir bool

	// IndexFallback answers a path that PublicDir does not have with
	// PublicDir's index.html.
	IndexFallback bool
}

// BindFlags defines the command line flags of the plugin on flags; parsing
// these fills in c.
func (c *Config) BindFlags(flags *pflag.FlagSet) {
	engine, limits := &c.Notify, &c.Limits
	flags.IntVar(&engine.MaxSize, "notifyMaxSize", notify.DefaultMaxSize,
		"the largest accepted data of a realtime message, in bytes of JSON")
	flags.IntVar(&engine.QueueSize, "notifyQueueSize", notify.DefaultQueueSize,
		"how many messages may wait for a realtime connection before it is closed")
	flags.IntVar(&engine.QueueBytes, "notifyQueueBytes", notify.DefaultQueueBytes,
		"how many bytes may wait for a realtime connection before it is closed")
	engine.Heartbeat = notify.DefaultHeartbeat
	flags.Var((*heartbeatFlag)(&engine.Heartbeat), "notifyHeartbeat",
		"how long a realtime connection may be idle before it gets a comment line; 0 is for ever")
	flags.IntVar(&limits.Connections, "notifyMaxConnections", 0,
		"how many realtime connections there may be; 0 is any number")
	flags.IntVar(&limits.ConnectionsPerIP, "notifyMaxConnectionsPerIP", 0,
		"how many realtime connections may come from one IP; 0 is any number")
	flags.IntVar(&limits.ConnectionsPerUser, "notifyMaxConnectionsPerUser", 0,
		"how many realtime connections one user may have; 0 is any number")
	flags.IntVar(&limits.Subscriptions, "notifyMaxSubscriptions", 0,
		"how many subscriptions a realtime connection may have; 0 is PocketBase's limit, 1000")
	flags.BoolVar(&engine.Strict, "notifyStrict", false,
		"refuse realtime topics that no channel matches, except to superusers")
	flags.StringVar(&c.MetricsToken, "notifyMetricsToken", "",
		"a bearer token that may read /api/notify/metrics, for scrapers (or HERALD_METRICS_TOKEN); empty: superusers only")
}

// heartbeatFlag is notify.Config.Heartbeat as a flag, for which 0 is none: in a
// Config that is the default.
type heartbeatFlag time.Duration

func (f *heartbeatFlag) Set(text string) error {
	d, err := time.ParseDuration(text)
	if err != nil || d < 0 {
		return errors.New("must be a duration such as 25s, or 0")
	}
	if d == 0 {
		d = -1
	}
	*f = heartbeatFlag(d)
	return nil
}

func (f *heartbeatFlag) String() string { return time.Duration(max(*f, 0)).String() }
func (f *heartbeatFlag) Type() string   { return "duration" }

// ExitError is the error that app.Start returns for a command "notify" that fails, with the
// code to exit with: 1 refused by the server, 2 wrong arguments, 3 no server answers.
type ExitError = cli.ExitError

// MustRegister is [Register] that panics on an error.
func MustRegister(app core.App, root *cobra.Command, config Config) {
	if err := Register(app, root, config); err != nil {
		panic(err)
	}
}

// Register binds all of Herald to app. Call it once, before app starts. root, such as
// app.RootCmd, gets the command "notify"; it may be nil.
//
// Each handler has an id that begins with "herald", by which it can be unbound.
func Register(app core.App, root *cobra.Command, config Config) error {
	if config.Notify.Hooked == nil {
		config.Notify.Hooked = func() bool { return app.OnRealtimeMessageSend().Length() > 0 }
	}
	notifier := notify.New(app, config.Notify)

	bindConnections(app, notifier, newLimits(config.Limits, notifier))
	bindChannels(app, notifier)
	bindRoutes(app, notifier)
	bindPublish(app, notifier)
	bindHistory(app, notifier)
	sent := triggers.Bind(app, notifier, flushTimeout)
	bindStats(app, notifier, sent, cmp.Or(config.MetricsToken, os.Getenv("HERALD_METRICS_TOKEN")))
	bindServer(app, notifier)
	bindInbox(app, notifier)
	bindPage(app, config)
	if root != nil {
		cli.Bind(app, root)
	}
	if config.JS == nil {
		return nil
	}
	return bindJS(app, *config.JS)
}
