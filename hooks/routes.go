// The superuser's routes under /api/notify: parse the request, call the engine, answer.

package hooks

import (
	"encoding/json/jsontext"
	"net/http"
	"strconv"

	"github.com/pocketbase/pocketbase/apis"
	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/hook"

	"herald/hooks/internal/api"
	"herald/notify"
)

// maxBatch is the maximum number of messages in one batch request.
const maxBatch = 1000

const (
	batchFailed   = "Failed to send the batch."
	recheckFailed = "Failed to check the subscriptions again."
)

// bindRoutes adds the superuser's routes under /api/notify. PocketBase's own middlewares (rate
// limits, body limit, CORS) apply to them as to its own routes.
func bindRoutes(app core.App, notifier *notify.Notifier) {
	routes := routes{notifier}
	app.OnServe().Bind(&hook.Handler[*core.ServeEvent]{
		Id: "heraldRoutes",
		Func: func(e *core.ServeEvent) error {
			api := e.Router.Group("/api/notify")
			api.Bind(apis.RequireSuperuserAuth(), apis.SkipSuccessActivityLog())
			api.POST("", routes.send)
			api.POST("/batch", routes.sendBatch)
			api.GET("/topics", routes.topics)
			api.GET("/clients", routes.clients)
			api.DELETE("/clients", routes.disconnectUser)
			api.DELETE("/clients/{id}", routes.disconnect)
			api.POST("/recheck", routes.recheck)
			return e.Next()
		},
	})
}

type routes struct{ notifier *notify.Notifier }

// send handles POST /api/notify.
func (r routes) send(e *core.RequestEvent) error {
	body, err := api.ReadBody(e)
	if err != nil {
		return err
	}
	report, err := r.sendRaw(e, body)
	if err != nil {
		return err
	}
	return e.JSON(http.StatusOK, report)
}

// sendBatch handles POST /api/notify/batch. It answers as PocketBase's own
// /api/batch does, with one {status, body} for each message.
func (r routes) sendBatch(e *core.RequestEvent) error {
	raw, err := api.ReadBody(e)
	if err != nil {
		return err
	}
	// the messages are decoded one by one, each with all checks, so that a bad message fails alone
	var body struct {
		Messages []jsontext.Value `json:"messages"`
	}
	if err := api.Decode(batchFailed, raw, &body); err != nil {
		return err
	}
	if err := api.CheckCount(batchFailed, "messages", len(body.Messages), maxBatch); err != nil {
		return err
	}
	results := make([]api.Result, len(body.Messages))
	for i, raw := range body.Messages {
		report, err := r.sendRaw(e, raw)
		if err != nil {
			apiErr := api.InField(err, "messages", strconv.Itoa(i))
			results[i] = api.Result{Status: apiErr.Status, Body: apiErr}
			continue
		}
		results[i] = api.Result{Status: http.StatusOK, Body: report}
	}
	return e.JSON(http.StatusOK, results)
}

// sendRaw sends the message described by raw, which is JSON. The error is ready to be answered.
func (r routes) sendRaw(e *core.RequestEvent, raw []byte) (notify.Report, error) {
	var body api.Message
	if err := api.DecodeMessage(raw, &body); err != nil {
		return notify.Report{}, err
	}
	report, err := r.notifier.Send(e.Request.Context(), body.Notify())
	if err != nil {
		return notify.Report{}, api.FieldsError(api.SendFailed, err)
	}
	return report, nil
}

// topics handles GET /api/notify/topics.
func (r routes) topics(e *core.RequestEvent) error {
	return api.RespondPage(e, r.notifier.Topics())
}

// clients handles GET /api/notify/clients?topic=&user=.
func (r routes) clients(e *core.RequestEvent) error {
	query := e.Request.URL.Query()
	connections, err := r.notifier.Connections(notify.ConnectionFilter{
		Topic: query.Get("topic"),
		User:  query.Get("user"),
	})
	if err != nil {
		return api.FieldsError("Failed to list the clients.", err)
	}
	return api.RespondPage(e, api.Clients(connections))
}

// disconnect handles DELETE /api/notify/clients/{id}.
func (r routes) disconnect(e *core.RequestEvent) error {
	if !r.notifier.Disconnect(e.Request.PathValue("id")) {
		return e.NotFoundError("There is no realtime client with this id.", nil)
	}
	return e.NoContent(http.StatusNoContent)
}

// disconnectUser handles DELETE /api/notify/clients?user=users:ID.
func (r routes) disconnectUser(e *core.RequestEvent) error {
	count, err := r.notifier.DisconnectUser(e.Request.URL.Query().Get("user"))
	if err != nil {
		return api.FieldsError("Failed to disconnect the clients.", err)
	}
	return e.JSON(http.StatusOK, map[string]int{"disconnected": count})
}

// recheck handles POST /api/notify/recheck.
func (r routes) recheck(e *core.RequestEvent) error {
	body, err := api.ReadBody(e)
	if err != nil {
		return err
	}
	var filter notify.RecheckFilter
	if len(body) > 0 {
		if err := api.Decode(recheckFailed, body, &filter); err != nil {
			return err
		}
	}
	report, err := r.notifier.Recheck(filter)
	if err != nil {
		return api.FieldsError(recheckFailed, err)
	}
	return e.JSON(http.StatusOK, report)
}
