// Presence: the routes by which clients see who is present and change how they are shown, and the
// hook that tells the application.

package hooks

import (
	"encoding/json/jsontext"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net/http"
	"strconv"
	"sync"
	"time"

	validation "github.com/pocketbase/ozzo-validation/v4"
	"github.com/pocketbase/pocketbase/apis"
	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/hook"

	"herald/hooks/internal/api"
	"herald/notify"
)

const (
	// defaultPresencePage is how many members a request gets if it does not set a limit.
	defaultPresencePage = 100
	// maxCounts is how many topics one request may count.
	maxCounts = 100
	// maxGrace is how many seconds a connection that leaves may have to come back.
	maxGrace = 10
	// maxChanges is how many changes may wait for the handlers of OnPresence.
	maxChanges = 10_000

	presenceFailed = "Failed to load who is present."
	showFailed     = "Failed to change the presence."
)

// PresenceEvent is what has changed about who is present on a topic, a quarter of a second ago or
// less. Somebody who has come and left in between is not in it.
type PresenceEvent struct {
	hook.Event
	App core.App

	Topic string
	// Join are users who have come, Update those who show something else now.
	Join, Update []notify.PresenceMember
	// Leave are users who have left, as "COLLECTION:RECORD_ID".
	Leave []string
	// Total is how many users are present now, Guests how many connections guests have.
	Total, Guests int
}

// presenceHookKey is the key of the hook in the application's store.
const presenceHookKey = "heraldOnPresence"

// OnPresence returns the hook of app that is triggered when users come to or leave a topic whose
// channel has presence. Handlers run one after another on a goroutine of their own, in the order of
// the changes. An error or a panic of a handler is logged.
//
//	hooks.OnPresence(app).BindFunc(func(e *hooks.PresenceEvent) error {
//		for _, user := range e.Leave {
//			endGameOf(user)
//		}
//		return e.Next()
//	})
func OnPresence(app core.App) *hook.Hook[*PresenceEvent] {
	return app.Store().GetOrSet(presenceHookKey, func() any { return &hook.Hook[*PresenceEvent]{} }).(*hook.Hook[*PresenceEvent])
}

// presence hands changes to the handlers and to the last seen.
type presence struct {
	app      core.App
	hook     *hook.Hook[*PresenceEvent]
	lastSeen *lastSeen

	mu        sync.Mutex // guards the fields below
	waiting   []notify.PresenceChange
	isHanding bool // a goroutine hands them over
	left      int  // out because too many waited
}

func newPresence(app core.App) *presence {
	return &presence{app: app, hook: OnPresence(app), lastSeen: newLastSeen(app)}
}

// changed is the engine's OnPresence.
func (p *presence) changed(change notify.PresenceChange) {
	p.lastSeen.note(recordIDs(change.Join), leavers(change.Leave))
	if p.hook.Length() == 0 {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.waiting) == maxChanges {
		if p.left++; p.left == 1 {
			p.app.Logger().Error("The handlers of OnPresence are too slow: changes are left out")
		}
		return
	}
	p.waiting = append(p.waiting, change)
	if !p.isHanding {
		p.isHanding = true
		go p.handOver()
	}
}

func recordIDs(members []notify.PresenceMember) []string {
	ids := make([]string, len(members))
	for i, member := range members {
		ids[i] = recordID(member.User)
	}
	return ids
}

func leavers(users []string) []string {
	ids := make([]string, len(users))
	for i, user := range users {
		ids[i] = recordID(user)
	}
	return ids
}

// handOver triggers the hook until nothing waits.
func (p *presence) handOver() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for len(p.waiting) > 0 {
		next := p.waiting[0]
		p.waiting = p.waiting[1:]
		p.mu.Unlock()
		p.trigger(next)
		p.mu.Lock()
	}
	p.waiting, p.isHanding, p.left = nil, false, 0
}

func (p *presence) trigger(change notify.PresenceChange) {
	defer func() {
		if cause := recover(); cause != nil {
			p.app.Logger().Error("Panic in a handler of OnPresence", slog.Any("cause", cause))
		}
	}()
	event := &PresenceEvent{App: p.app, Topic: change.Topic, Join: change.Join, Update: change.Update, Leave: change.Leave, Total: change.Total, Guests: change.Guests}
	if err := p.hook.Trigger(event); err != nil {
		p.app.Logger().Error("A handler of OnPresence failed", slog.String("topic", change.Topic), slog.String("error", err.Error()))
	}
}

// bindPresence adds the routes.
func bindPresence(app core.App, notifier *notify.Notifier) {
	r := presenceRoutes{notifier}
	bindUsers(app, notifier)
	app.OnServe().Bind(&hook.Handler[*core.ServeEvent]{
		Id: "heraldPresence",
		Func: func(e *core.ServeEvent) error {
			e.Router.GET("/api/notify/presence", r.list).Bind(apis.SkipSuccessActivityLog())
			e.Router.PUT("/api/notify/presence", r.show).Bind(apis.SkipSuccessActivityLog())
			e.Router.DELETE("/api/notify/presence", r.leave).Bind(apis.SkipSuccessActivityLog())
			e.Router.GET("/api/notify/presence/users", r.topicsOf).Bind(apis.RequireSuperuserAuth(), apis.SkipSuccessActivityLog())
			return e.Next()
		},
	})
}

// bindUsers tells the engine what becomes of users who are still shown.
func bindUsers(app core.App, notifier *notify.Notifier) {
	changed := func(e *core.RecordEvent) error {
		if e.Record.Collection().IsAuth() {
			after := e.Record
			if e.Type == core.ModelEventTypeDelete {
				after = nil
			}
			notifier.UserChanged(e.Record, after)
		}
		return e.Next()
	}
	app.OnRecordAfterUpdateSuccess().Bind(&hook.Handler[*core.RecordEvent]{Id: "heraldUsers", Func: changed})
	app.OnRecordAfterDeleteSuccess().Bind(&hook.Handler[*core.RecordEvent]{Id: "heraldUsers", Func: changed})
}

type presenceRoutes struct{ notifier *notify.Notifier }

// list handles GET /api/notify/presence?topic=&cursor=&limit= and ?topic=a&topic=b&count=1.
func (r presenceRoutes) list(e *core.RequestEvent) error {
	began := time.Now()
	query := e.Request.URL.Query()
	if isCount, _ := strconv.ParseBool(query.Get("count")); isCount {
		return r.count(e, query["topic"], began)
	}
	errs := validation.Errors{}
	limit := api.IntParam(e, "limit", defaultPresencePage, errs)
	if len(errs) > 0 {
		return e.BadRequestError(presenceFailed, errs)
	}
	page, err := r.notifier.PresenceFor(publisherOf(e), query.Get("topic"), query.Get("cursor"), min(limit, notify.MaxPresencePage))
	if err != nil {
		return presenceError(e, presenceFailed, err, began)
	}
	e.Response.Header().Set("Cache-Control", "no-store")
	return e.JSON(http.StatusOK, page)
}

// topicCount is the number of those present on a topic.
type topicCount struct {
	Topic  string `json:"topic"`
	Total  int    `json:"total"`
	Guests int    `json:"guests"`
}

// count answers with the numbers of several topics. If one of them may not be seen, that is an
// error.
func (r presenceRoutes) count(e *core.RequestEvent, topics []string, began time.Time) error {
	if len(topics) > maxCounts {
		return e.BadRequestError(presenceFailed, validation.Errors{
			"topic": validation.NewError("validation_length_too_long", "the length must be no more than "+strconv.Itoa(maxCounts))})
	}
	items := make([]topicCount, 0, len(topics))
	for _, topic := range topics {
		users, guests, err := r.notifier.PresenceCountFor(publisherOf(e), topic)
		if err != nil {
			return presenceError(e, presenceFailed, err, began)
		}
		items = append(items, topicCount{topic, users, guests})
	}
	e.Response.Header().Set("Cache-Control", "no-store")
	return e.JSON(http.StatusOK, map[string]any{"items": items})
}

// show handles PUT /api/notify/presence.
func (r presenceRoutes) show(e *core.RequestEvent) error {
	began := time.Now()
	raw, err := api.ReadBody(e)
	if err != nil {
		return err
	}
	var body struct {
		Topic    string         `json:"topic"`
		Meta     jsontext.Value `json:"meta"`
		Visible  *bool          `json:"visible"`
		ClientID string         `json:"clientId"`
	}
	if err := api.Decode(showFailed, raw, &body); err != nil {
		return err
	}
	update := notify.PresenceUpdate{Visible: body.Visible, ClientID: body.ClientID}
	if len(body.Meta) > 0 {
		if err := body.Meta.Compact(); err != nil { // as it is shown and measured
			return e.BadRequestError(showFailed, err)
		}
		update.Meta = &body.Meta
	}
	if err := r.notifier.SetPresence(publisherOf(e), body.Topic, update); err != nil {
		return presenceError(e, showFailed, err, began)
	}
	return e.NoContent(http.StatusNoContent)
}

// leave handles DELETE /api/notify/presence?topic=&clientId=&grace=.
func (r presenceRoutes) leave(e *core.RequestEvent) error {
	began := time.Now()
	query := e.Request.URL.Query()
	grace := 0.0
	if text := query.Get("grace"); text != "" {
		seconds, err := strconv.ParseFloat(text, 64)
		if err != nil || !(seconds >= 0 && seconds <= maxGrace) {
			return e.BadRequestError(showFailed, validation.Errors{
				"grace": validation.NewError("validation_invalid_number", fmt.Sprintf("must be a number of seconds, 0 to %d", maxGrace)),
			})
		}
		grace = seconds
	}
	if err := r.notifier.LeavePresence(publisherOf(e), query.Get("topic"), query.Get("clientId"), time.Duration(grace*float64(time.Second))); err != nil {
		return presenceError(e, showFailed, err, began)
	}
	return e.NoContent(http.StatusNoContent)
}

// topicsOf handles GET /api/notify/presence/users?user=users:ID.
func (r presenceRoutes) topicsOf(e *core.RequestEvent) error {
	user := e.Request.URL.Query().Get("user")
	topics, err := r.notifier.PresentOn(user)
	if err != nil {
		return api.FieldsError(presenceFailed, err)
	}
	return e.JSON(http.StatusOK, map[string]any{"user": user, "online": r.notifier.Online(user), "topics": topics})
}

// presenceError turns an error of the engine into an answer. What may not be seen, and what there is
// not, are answered alike, and take as long.
func presenceError(e *core.RequestEvent, message string, err error, began time.Time) error {
	var tooMany *notify.TooManyError
	switch {
	case isForbidden(err):
		delayDenial(e, began)
		return e.ForbiddenError(notify.DeniedMessage, validation.Errors{"topic": validation.NewError("validation_topic_forbidden", notify.DeniedMessage)})
	case errors.Is(err, notify.ErrGuest):
		return e.ForbiddenError("Guests are only counted. Sign in to show something.", nil)
	case errors.As(err, &tooMany):
		e.Response.Header().Set("Retry-After", strconv.Itoa(int(math.Ceil(tooMany.RetryAfter.Seconds()))))
		return e.TooManyRequestsError("You change your presence too often.", nil)
	}
	return api.FieldsError(message, err)
}
