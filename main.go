// Command herald is PocketBase plus the realtime messages that PocketBase leaves to its users. It
// is used like PocketBase's own executable.
package main

import (
	"errors"
	"fmt"
	"log"
	"os"
	"path/filepath"

	"github.com/pocketbase/pocketbase"
	"github.com/pocketbase/pocketbase/plugins/jsvm"
	"github.com/pocketbase/pocketbase/plugins/migratecmd"
	"github.com/pocketbase/pocketbase/tools/osutils"

	"herald/hooks"
	"herald/pb_public"
)

// version is set by the build (see the Makefile).
var version = "dev"

func main() {
	app := pocketbase.New()
	app.RootCmd.Version = version + " (PocketBase " + pocketbaseVersion() + ")"

	var jsConfig jsvm.Config
	config := hooks.Config{Page: pb_public.FS, JS: &jsConfig, Version: version}
	var migrations migratecmd.Config

	// the flags of PocketBase's own executable (its examples/base/main.go)
	flags := app.RootCmd.PersistentFlags()
	flags.StringVar(&jsConfig.HooksDir, "hooksDir", "", "the directory with the JS app hooks")
	flags.BoolVar(&jsConfig.HooksWatch, "hooksWatch", true, "auto restart the app on pb_hooks file change; it has no effect on Windows")
	flags.IntVar(&jsConfig.HooksPoolSize, "hooksPool", 15, "the total prewarm goja.Runtime instances for the JS app hooks execution")
	flags.StringVar(&migrations.Dir, "migrationsDir", "", "the directory with the user defined migrations")
	flags.BoolVar(&migrations.Automigrate, "automigrate", true, "enable/disable auto migrations")
	flags.StringVar(&config.PublicDir, "publicDir", defaultPublicDir(), "the directory to serve static files")
	flags.BoolVar(&config.IndexFallback, "indexFallback", true,
		"fallback the request to index.html on missing static path, e.g. when pretty urls are used with SPA")
	config.BindFlags(flags)

	app.RootCmd.ParseFlags(os.Args[1:])
	config.RequirePublicDir = flags.Changed("publicDir")

	jsConfig.MigrationsDir = migrations.Dir
	hooks.MustRegister(app, app.RootCmd, config)

	// Under "go run", a change in the dashboard creates a Go migration, which the next build
	// compiles in, because the developer works on the Go code. The executable writes JS migrations,
	// like the stock one.
	migrations.TemplateLang = migratecmd.TemplateLangJS
	if osutils.IsProbablyGoRun() {
		migrations.TemplateLang = migratecmd.TemplateLangGo
		if migrations.Dir == "" {
			migrations.Dir = filepath.Join(app.DataDir(), "../pb_migrations")
		}
	}
	migratecmd.MustRegister(app, app.RootCmd, migrations)

	if err := app.Start(); err != nil {
		var exit *hooks.ExitError
		if errors.As(err, &exit) {
			fmt.Fprintln(os.Stderr, "herald:", exit)
			os.Exit(exit.Code)
		}
		log.Fatal(err)
	}
}

// defaultPublicDir is beside the executable or, under "go run", in the working directory, as in
// PocketBase.
func defaultPublicDir() string {
	if osutils.IsProbablyGoRun() {
		return "./pb_public"
	}
	return filepath.Join(os.Args[0], "../pb_public")
}
