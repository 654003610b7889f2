package notify_test

import (
	"context"
	"fmt"
	"net/http"

	"github.com/pocketbase/pocketbase"
	"github.com/pocketbase/pocketbase/apis"
	"github.com/pocketbase/pocketbase/core"

	"herald/notify"
)

// A job that runs on a schedule tells its progress.
func ExampleNotify() {
	app := pocketbase.New()

	app.Cron().MustAdd("export", "0 3 * * *", func() {
		for percent := 0; percent <= 100; percent += 20 {
			// … do a fifth of the work …
			if err := notify.Notify(app, "exports", map[string]any{"percent": percent}); err != nil {
				app.Logger().Error("Failed to tell the progress", "error", err)
			}
		}
	})
}

// A hook on a collection notifies the record's owner, on every tab and device.
func ExampleNotifier_Send() {
	app := pocketbase.New()

	app.OnRecordAfterUpdateSuccess("orders").BindFunc(func(e *core.RecordEvent) error {
		report, err := notify.New(e.App, notify.Config{}).Send(context.Background(), notify.Message{
			Topic: "orders",
			Data:  map[string]any{"id": e.Record.Id, "status": e.Record.GetString("status")},
			To:    notify.Audience{Users: []string{"users:" + e.Record.GetString("owner")}},
		})
		if err != nil {
			return err
		}
		fmt.Println("told", report.Queued, "connections")
		return e.Next()
	})
}

// A route of the application's own takes a chat line from a signed-in user and
// passes it on to everybody in the room but the tab it came from.
func ExampleNotifier_Send_chat() {
	app := pocketbase.New()

	app.OnServe().BindFunc(func(e *core.ServeEvent) error {
		e.Router.POST("/chat/{room}", func(e *core.RequestEvent) error {
			var line struct {
				Text     string `json:"text"`
				ClientID string `json:"clientId"` // pb.realtime.clientId
			}
			if err := e.BindBody(&line); err != nil {
				return e.BadRequestError("", err)
			}
			report, err := notify.New(e.App, notify.Config{}).Send(e.Request.Context(), notify.Message{
				Topic:  "chat/" + e.Request.PathValue("room"),
				Data:   map[string]any{"from": e.Auth.GetString("name"), "text": line.Text},
				Except: notify.Except{Clients: []string{line.ClientID}},
			})
			if err != nil {
				return e.BadRequestError("", err)
			}
			return e.JSON(http.StatusOK, map[string]int{"reached": report.Queued})
		}).Bind(apis.RequireAuth())
		return e.Next()
	})
}
