// Messages that clients publish: the route, and the hook that lets an application see them first.

package hooks

import (
	"encoding/json/jsontext"
	"encoding/json/v2"
	"errors"
	"math"
	"net/http"
	"strconv"
	"time"

	"github.com/pocketbase/pocketbase"
	"github.com/pocketbase/pocketbase/apis"
	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/hook"
	"github.com/pocketbase/pocketbase/tools/inflector"

	"herald/hooks/internal/api"
	"herald/notify"
)

// PublishEvent is a message that a client publishes, after the rule, the rate and the size have
// been checked. Handlers may change Data and the exceptions, or refuse the message by returning an
// error. Their changes are not checked again, except against the server's own size limit. A handler
// that returns nil without calling Next drops the message, and the client is not told.
type PublishEvent struct {
	hook.Event
	*core.RequestEvent // Auth is the publisher, nil for a guest

	// Channel is the record of the topic's channel. It is nil if a superuser publishes to a topic
	// without one.
	Channel *core.Record
	Topic   string
	// Data is the message as JSON decodes it (map[string]any, []any, float64, …). It may be
	// replaced by anything that JSON encodes. Numbers that no handler changes are sent exactly as
	// received, even integers too large for a float64.
	Data any
	// ExceptUsers and ExceptClients are left out, as in notify.Except.
	ExceptUsers   []string
	ExceptClients []string

	inJS bool // Data has the lists that JavaScript needs
}

// publishHookKey is the key of the hook in the application's store.
const publishHookKey = "heraldOnPublish"

// OnPublish returns the hook of app that is triggered for each message that a client publishes,
// before it is sent, to moderate or enrich it.
//
//	hooks.OnPublish(app).BindFunc(func(e *hooks.PublishEvent) error {
//		if e.Topic == "announcements" && e.Auth.GetBool("muted") {
//			return e.ForbiddenError("You are muted.", nil)
//		}
//		return e.Next()
//	})
func OnPublish(app core.App) *hook.Hook[*PublishEvent] {
	return app.Store().GetOrSet(publishHookKey, func() any { return &hook.Hook[*PublishEvent]{} }).(*hook.Hook[*PublishEvent])
}

// jsApp is the application for the jsvm plugin. It gives pb_hooks onNotifyPublish and onNotifyPresence, because the
// plugin turns each method whose name begins with On into a JS hook.
type jsApp struct{ core.App }

// OnNotifyPublish is [OnPublish], for the plugin.
func (a jsApp) OnNotifyPublish() jsPublishHook { return jsPublishHook{OnPublish(a.App)} }

// OnNotifyPresence is [OnPresence], for the plugin.
func (a jsApp) OnNotifyPresence() jsPresenceHook { return jsPresenceHook{OnPresence(a.App)} }

// jsPocketBase is jsApp for PocketBase's own type: of a struct that is embedded JavaScript
// also sees the fields, such as $app.rootCmd.
type jsPocketBase struct{ *pocketbase.PocketBase }

// OnNotifyPublish is [OnPublish], for the plugin.
func (a jsPocketBase) OnNotifyPublish() jsPublishHook { return jsPublishHook{OnPublish(a.PocketBase)} }

// OnNotifyPresence is [OnPresence], for the plugin.
func (a jsPocketBase) OnNotifyPresence() jsPresenceHook {
	return jsPresenceHook{OnPresence(a.PocketBase)}
}

func newJSApp(app core.App) core.App {
	if pb, ok := app.(*pocketbase.PocketBase); ok {
		return jsPocketBase{pb}
	}
	return jsApp{app}
}

// bindPublish adds the route by which clients publish.
func bindPublish(app core.App, notifier *notify.Notifier) {
	p := publish{notifier, OnPublish(app)}
	app.OnServe().Bind(&hook.Handler[*core.ServeEvent]{
		Id: "heraldPublish",
		Func: func(e *core.ServeEvent) error {
			e.Router.POST("/api/notify/publish", p.publish).Bind(apis.SkipSuccessActivityLog())
			return e.Next()
		},
	})
}

type publish struct {
	notifier *notify.Notifier
	hook     *hook.Hook[*PublishEvent]
}

// publishBody is a client's message as it comes over HTTP.
type publishBody struct {
	Topic  string         `json:"topic"`
	Data   jsontext.Value `json:"data"`
	Except notify.Except  `json:"except"`
	ID     string         `json:"id"`
	// Self false leaves out the sender's own connection, given by ClientID or the header
	// X-Client-Id.
	Self     *bool  `json:"self"`
	ClientID string `json:"clientId"`
}

// published is the answer to a client. It does not reveal how many subscribers there are.
type published struct {
	ID    string `json:"id"`
	Topic string `json:"topic"`
	Epoch string `json:"epoch,omitzero"`
	Seq   int64  `json:"seq,omitzero"`
}

// publish handles POST /api/notify/publish.
func (p publish) publish(e *core.RequestEvent) error {
	began := time.Now()
	raw, err := api.ReadBody(e)
	if err != nil {
		return err
	}
	var body publishBody
	if err := api.DecodeMessage(raw, &body); err != nil {
		return err
	}
	if err := body.Data.Compact(); err != nil && len(body.Data) > 0 { // as it is sent and measured
		return e.BadRequestError(api.SendFailed, err)
	}
	publisher := publisherOf(e)

	channel, err := p.notifier.MayPublish(publisher, body.Topic, len(body.Data))
	if err != nil {
		return publishError(e, err, began)
	}
	except, err := p.exceptions(e, publisher, body)
	if err != nil {
		return api.FieldsError(api.SendFailed, err)
	}

	msg := notify.Message{Topic: body.Topic, Data: body.Data, Except: except, ID: body.ID}
	send := func() error {
		report, err := p.notifier.SendFrom(e.Request.Context(), publisher, msg)
		if err != nil {
			return api.FieldsError(api.SendFailed, err)
		}
		if e.HasSuperuserAuth() {
			return e.JSON(http.StatusOK, report)
		}
		return e.JSON(http.StatusOK, published{report.ID, report.Topic, report.Epoch, report.Seq})
	}
	if p.hook.Length() == 0 {
		return send()
	}
	return p.triggerHook(e, channel, &msg, send)
}

// publisherOf returns the publisher behind a request.
func publisherOf(e *core.RequestEvent) notify.Publisher {
	return notify.Publisher{
		Auth: e.Auth, IP: e.RealIP(),
		Headers: func() map[string]string { return ruleHeaders(e.Request.Header) },
	}
}

// ruleHeaders returns headers as rules see them: see initRequestInfo in PocketBase's
// core/event_request.go.
func ruleHeaders(header http.Header) map[string]string {
	headers := make(map[string]string, len(header))
	for name := range header {
		headers[inflector.Snakecase(name)] = header.Get(name)
	}
	return headers
}

// triggerHook lets the handlers of OnPublish see and change msg, and then calls send.
func (p publish) triggerHook(e *core.RequestEvent, channel *core.Record, msg *notify.Message, send func() error) error {
	event := &PublishEvent{
		RequestEvent: e, Channel: channel, Topic: msg.Topic,
		ExceptUsers: msg.Except.Users, ExceptClients: msg.Except.Clients,
	}
	raw := msg.Data.(jsontext.Value)
	if len(raw) > 0 { // otherwise send reports that it is missing
		if err := json.Unmarshal(raw, &event.Data); err != nil {
			return e.BadRequestError(api.SendFailed, err)
		}
	}
	before, err := json.Marshal(event.Data, json.Deterministic(true))
	if err != nil {
		return e.BadRequestError(api.SendFailed, err)
	}
	return p.hook.Trigger(event, func(event *PublishEvent) error {
		// unchanged data keeps its numbers and the order of its names
		after, err := json.Marshal(event.Data, json.Deterministic(true))
		switch {
		case err == nil && string(after) == string(before):
		case err != nil || len(raw) == 0:
			msg.Data = event.Data
		default:
			if msg.Data, err = keepNumbers(raw, after); err != nil {
				return e.BadRequestError(api.SendFailed, err)
			}
		}
		msg.Except = notify.Except{Users: event.ExceptUsers, Clients: event.ExceptClients}
		return send()
	})
}

// exceptions returns the exceptions of the message.
func (p publish) exceptions(e *core.RequestEvent, publisher notify.Publisher, body publishBody) (notify.Except, error) {
	except := body.Except
	id := body.ClientID
	if id == "" {
		id = e.Request.Header.Get("X-Client-Id")
	}
	withSelf := body.Self == nil || *body.Self
	if withSelf && body.ClientID == "" {
		return except, nil
	}
	if _, err := p.notifier.OwnClient(publisher, id); err != nil {
		return except, err
	}
	if !withSelf {
		except.Clients = append(except.Clients, id)
	}
	return except, nil
}

func isForbidden(err error) bool { return errors.Is(err, notify.ErrForbidden) }

// publishError turns an error of [notify.Notifier.MayPublish] into an answer.
func publishError(e *core.RequestEvent, err error, began time.Time) error {
	var tooMany *notify.TooManyError
	switch {
	case isForbidden(err):
		delayDenial(e, began)
		return e.ForbiddenError("You are not allowed to publish to this topic.", nil)
	case errors.As(err, &tooMany):
		seconds := int(math.Ceil(tooMany.RetryAfter.Seconds()))
		e.Response.Header().Set("Retry-After", strconv.Itoa(seconds))
		return e.TooManyRequestsError("You publish too often to this topic.", nil)
	}
	return api.FieldsError(api.SendFailed, err)
}
