// Package hooks binds the delivery engine (herald/notify) to a PocketBase
// application: its realtime connections, the /api/notify routes, the inbox and
// the web page.
package hooks

import (
	"io/fs"

	"github.com/pocketbase/pocketbase/core"
	"github.com/spf13/pflag"

	"herald/notify"
)

// Config holds the options of the plugin. The zero value works.
type Config struct {
	// Notify configures the engine.
	Notify notify.Config

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
	flags.IntVar(
		&c.Notify.MaxSize,
		"notifyMaxSize",
		notify.DefaultMaxSize,
		"the largest accepted data of a realtime message, in bytes of JSON",
	)
}

// MustRegister is [Register] that panics on an error.
func MustRegister(app core.App, config Config) {
	if err := Register(app, config); err != nil {
		panic(err)
	}
}

// Register binds Herald to app. Call it once, before app starts.
//
// Each handler has an id that begins with "herald", by which it can be unbound.
func Register(app core.App, config Config) error {
	notifier := notify.New(app, config.Notify)

	bindConnections(app, notifier)
	bindRoutes(app, notifier)
	bindInbox(app, notifier)
	bindPage(app, config)

	return nil
}
