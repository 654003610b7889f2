// Package hooks binds the delivery engine (herald/notify) to a PocketBase application: its realtime
// connections, the /api/notify routes, the inbox and the web page.
package hooks

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"strconv"
	"time"

	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/plugins/jsvm"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"herald/hooks/internal/cli"
	"herald/hooks/internal/triggers"
	"herald/notify"
	"herald/notify/origin"
)

// Config holds the options of the plugin. The zero value works.
type Config struct {
	// Notify configures the engine.
	Notify notify.Config

	// Limits bound what clients may use of the server.
	Limits Limits

	// Origin says how edges reach the server, which hold realtime connections for it. The zero value
	// means that there are none.
	Origin origin.Config

	// MetricsToken is a bearer token that gives access to /api/notify/metrics. Defaults to the
	// environment variable HERALD_METRICS_TOKEN. If both are empty, only superusers have access.
	MetricsToken string

	// Version of the application, for the stats. Optional.
	Version string

	// JS registers PocketBase's jsvm plugin (pb_hooks and JavaScript migrations) with $notify,
	// onNotifyPublish and onNotifyPresence, instead of jsvm.MustRegister. Nil means no JavaScript.
	JS *jsvm.Config

	// Page is served at / if there is no PublicDir. Defaults to nothing.
	Page fs.FS

	// PublicDir is a folder with static files to serve at / instead of Page, if it exists or
	// RequirePublicDir is set.
	PublicDir        string
	RequirePublicDir bool

	// IndexFallback answers a path that is missing in PublicDir with PublicDir's index.html.
	IndexFallback bool
}

// BindFlags defines the command line flags of the plugin on flags; parsing them sets the fields of
// c.
func (c *Config) BindFlags(flags *pflag.FlagSet) {
	engine, limits := &c.Notify, &c.Limits
	number := func(value *int, name string, byDefault, atLeast int, usage string) {
		*value = byDefault
		flags.Var(&numberFlag{value, atLeast, math.MaxInt}, name, usage)
	}
	number(&engine.MaxSize, "notifyMaxSize", notify.DefaultMaxSize, 1,
		"the maximum size of a realtime message's data, in bytes of JSON")
	number(&engine.QueueSize, "notifyQueueSize", notify.DefaultQueueSize, 1,
		"how many messages may wait for a realtime connection before it is closed")
	number(&engine.QueueBytes, "notifyQueueBytes", notify.DefaultQueueBytes, 1,
		"how many bytes may wait for a realtime connection before it is closed")
	engine.Heartbeat = notify.DefaultHeartbeat
	flags.Var((*heartbeatFlag)(&engine.Heartbeat), "notifyHeartbeat",
		"how long a realtime connection may be idle before it gets a comment line; 0 means never")
	number(&limits.Connections, "notifyMaxConnections", 0, 0,
		"the maximum number of realtime connections; 0 means no limit")
	number(&limits.ConnectionsPerIP, "notifyMaxConnectionsPerIP", 0, 0,
		"the maximum number of realtime connections per IP; 0 means no limit")
	number(&limits.ConnectionsPerUser, "notifyMaxConnectionsPerUser", 0, 0,
		"the maximum number of realtime connections per user; 0 means no limit")
	number(&limits.Subscriptions, "notifyMaxSubscriptions", 0, 0,
		"the maximum number of subscriptions per realtime connection; 0 means PocketBase's limit, 1000")
	engine.MaxMeta = notify.DefaultMaxMeta
	flags.Var(&numberFlag{&engine.MaxMeta, 1, notify.MaxMeta}, "notifyMaxMeta",
		"how many bytes of JSON a user may show about themselves on a topic with presence; at most 4096")
	flags.BoolVar(&engine.Strict, "notifyStrict", false,
		"let only superusers subscribe to realtime topics that no channel matches")
	flags.StringVar(&c.Origin.NATS, "notifyNATS", "",
		"the NATS server over which edges reach this server, nats://HOST:PORT, or embedded://127.0.0.1:4222 for one inside this process")
	flags.StringVar(&c.Origin.Credentials, "notifyNATSCreds", "", "a file with NATS user credentials, or the seed of an nkey")
	flags.StringVar(&c.Origin.App, "notifyApp", origin.DefaultApp, "the name of this application on the NATS server")
	flags.StringVar(&c.MetricsToken, "notifyMetricsToken", "",
		"a bearer token for scrapers of /api/notify/metrics (or set HERALD_METRICS_TOKEN); without one, only superusers have access")
}

// numberFlag is a flag for a number that must be in a range.
type numberFlag struct {
	value           *int
	atLeast, atMost int
}

func (f *numberFlag) Set(text string) error {
	n, err := strconv.Atoi(text)
	switch {
	case err == nil && n > f.atMost:
		return fmt.Errorf("must be at most %d", f.atMost)
	case err != nil || n < f.atLeast:
		return fmt.Errorf("must be a number, at least %d", f.atLeast)
	}
	*f.value = n
	return nil
}

func (f *numberFlag) String() string {
	if f.value == nil { // pflag asks a zero flag
		return "0"
	}
	return strconv.Itoa(*f.value)
}

func (f *numberFlag) Type() string { return "int" }

// heartbeatFlag is notify.Config.Heartbeat as a flag. For the flag, 0 means never; in a Config it
// means the default.
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

// ExitError is the error that app.Start returns if a command "notify" fails. It has the exit code:
// 1 if the server refused, 2 for wrong arguments, 3 if no server answers.
type ExitError = cli.ExitError

// MustRegister is [Register], but panics on an error.
func MustRegister(app core.App, root *cobra.Command, config Config) {
	if err := Register(app, root, config); err != nil {
		panic(err)
	}
}

// Register binds all of Herald to app. Call it once, before app starts. It adds the command
// "notify" to root, such as app.RootCmd, which may be nil.
//
// The id of each handler begins with "herald", so that it can be unbound.
func Register(app core.App, root *cobra.Command, config Config) error {
	if config.Notify.Hooked == nil {
		config.Notify.Hooked = func() bool { return app.OnRealtimeMessageSend().Length() > 0 }
	}
	present := newPresence(app)
	onPresence := config.Notify.OnPresence
	config.Notify.OnPresence = func(change notify.PresenceChange) {
		present.changed(change)
		if onPresence != nil {
			onPresence(change)
		}
	}
	notifier := notify.New(app, config.Notify)

	bindConnections(app, notifier, newLimits(config.Limits, notifier))
	bindChannels(app, notifier)
	bindArrivals(app)
	bindTokens(app)
	bindRoutes(app, notifier)
	bindPublish(app, notifier)
	bindHistory(app, notifier)
	bindPresence(app, notifier)
	sent := triggers.Bind(app, notifier, flushTimeout)
	edges := &edges{app: app, notifier: notifier, config: config.Origin}
	bindStats(app, notifier, sent, edges, config.Version, cmp.Or(config.MetricsToken, os.Getenv("HERALD_METRICS_TOKEN")))
	bindServer(app, notifier)
	edges.bind()
	present.lastSeen.bind()
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
