// Command custom is a PocketBase application with its own code and Herald: your existing code plus
// one line.
package main

import (
	"log"

	"github.com/pocketbase/pocketbase"
	"github.com/pocketbase/pocketbase/core"

	"herald/hooks"
	"herald/notify"
)

func main() {
	app := pocketbase.New()
	hooks.MustRegister(app, app.RootCmd, hooks.Config{})

	// tell all subscribers that a user has signed up
	app.OnRecordAfterCreateSuccess("users").BindFunc(func(e *core.RecordEvent) error {
		if err := notify.Notify(e.App, "sign-ups", map[string]any{"name": e.Record.GetString("name")}); err != nil {
			e.App.Logger().Warn("Failed to announce a sign-up", "error", err.Error())
		}
		return e.Next()
	})

	if err := app.Start(); err != nil {
		log.Fatal(err)
	}
}
