// Missed messages: the route that clients get them from, and the history's part in backups.

package hooks

import (
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"time"

	validation "github.com/pocketbase/ozzo-validation/v4"
	"github.com/pocketbase/pocketbase/apis"
	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/hook"
	"github.com/pocketbase/pocketbase/tools/router"

	"herald/hooks/internal/api"
	"herald/notify"
)

// defaultHistoryPage is how many messages a request gets if it does not set a limit.
const defaultHistoryPage = 100

const (
	// maxHistoryTopics is how many topics one request may ask for.
	maxHistoryTopics = 100
	// minPageBytes is how many bytes of messages each of them gets at least.
	minPageBytes = 16 << 10
)

type history struct{ notifier *notify.Notifier }

func bindHistory(app core.App, notifier *notify.Notifier) {
	h := history{notifier}
	app.OnServe().Bind(&hook.Handler[*core.ServeEvent]{
		Id: "heraldHistory",
		Func: func(e *core.ServeEvent) error {
			if err := notifier.OpenHistory(); err != nil {
				e.App.Logger().Error("Failed to open the history of topics", slog.String("error", err.Error()))
			}
			e.Router.GET("/api/notify/history", h.page).Bind(apis.SkipSuccessActivityLog())
			e.Router.POST("/api/notify/history", h.pages).Bind(apis.SkipSuccessActivityLog())
			return e.Next()
		},
	})
	app.OnBackupCreate().Bind(&hook.Handler[*core.BackupEvent]{
		Id:   "heraldHistory",
		Func: h.backup,
	})
}

const historyFailed = "Failed to load the history."

// wanted is a page that a client asks for.
type wanted struct {
	Topic  string `json:"topic"`
	Since  string `json:"since"`
	Rewind string `json:"rewind"`
	Limit  *int   `json:"limit"`
	// Subscription is a subscription key of the topic. The answer says whether the last of the reader's connections has it.
	Subscription string `json:"subscription"`
}

// page handles GET /api/notify/history.
func (h history) page(e *core.RequestEvent) error {
	began := time.Now()
	query := e.Request.URL.Query()
	errs := validation.Errors{}
	limit := api.IntParam(e, "limit", defaultHistoryPage, errs)
	reader := publisherOf(e)
	reader.ClientIDs = notify.ParseClientIDs(query.Get("clientId"))
	page, apiErr := h.read(e, reader, wanted{query.Get("topic"), query.Get("since"), query.Get("rewind"), &limit, query.Get("subscription")}, notify.MaxPageBytes, errs)
	if apiErr != nil {
		if apiErr.Status == http.StatusForbidden {
			delayDenial(e, began)
		}
		return apiErr
	}
	e.Response.Header().Set("Cache-Control", "no-store")
	return e.JSON(http.StatusOK, page)
}

// pages handles POST /api/notify/history. It answers as PocketBase's own /api/batch does, with one
// {status, body} for each topic.
func (h history) pages(e *core.RequestEvent) error {
	began := time.Now()
	raw, err := api.ReadBody(e)
	if err != nil {
		return err
	}
	var body struct {
		Topics   []wanted `json:"topics"`
		ClientID string   `json:"clientId"`
	}
	if err := api.Decode(historyFailed, raw, &body); err != nil {
		return err
	}
	if err := api.CheckCount(historyFailed, "topics", len(body.Topics), maxHistoryTopics); err != nil {
		return err
	}
	reader := publisherOf(e)
	reader.ClientIDs = notify.ParseClientIDs(body.ClientID)
	// all pages together are about as large as one alone may be
	maxBytes := max(notify.MaxPageBytes/len(body.Topics), minPageBytes)
	results := make([]api.Result, len(body.Topics))
	isDenied := false
	for i, topic := range body.Topics {
		page, apiErr := h.read(e, reader, topic, maxBytes, validation.Errors{})
		if apiErr != nil {
			isDenied = isDenied || apiErr.Status == http.StatusForbidden
			results[i] = api.Result{Status: apiErr.Status, Body: apiErr}
			continue
		}
		results[i] = api.Result{Status: http.StatusOK, Body: page}
	}
	if isDenied {
		delayDenial(e, began)
	}
	e.Response.Header().Set("Cache-Control", "no-store")
	return e.JSON(http.StatusOK, results)
}

// read reads a page. errs are errors that are known already.
func (h history) read(e *core.RequestEvent, reader notify.Publisher, w wanted, maxBytes int, errs validation.Errors) (*notify.HistoryPage, *router.ApiError) {
	from, err := notify.ParseStart(w.Since, w.Rewind)
	if err != nil {
		field := "since"
		if w.Since == "" {
			field = "rewind"
		}
		errs[field] = validation.NewError("validation_invalid_position", err.Error())
	}
	if len(errs) > 0 {
		return nil, e.BadRequestError(historyFailed, errs)
	}
	var subscribed *bool
	if w.Subscription != "" { // before the page is read
		last := ""
		if ids := reader.ClientIDs; len(ids) > 0 {
			last = ids[len(ids)-1]
		}
		subscribed = new(h.notifier.IsSubscribed(last, w.Topic, w.Subscription))
	}
	limit := defaultHistoryPage
	if w.Limit != nil {
		limit = *w.Limit
	}
	page, err := h.notifier.History(e.Request.Context(), reader, w.Topic, from, min(limit, notify.MaxHistoryPage), maxBytes)
	switch {
	case err == nil:
		page.Subscribed = subscribed
		return page, nil
	case isForbidden(err):
		// the code distinguishes this refusal from one by a proxy
		return nil, e.ForbiddenError(notify.DeniedMessage, validation.Errors{"topic": validation.NewError("validation_topic_forbidden", notify.DeniedMessage)})
	}
	return nil, api.FieldsError(historyFailed, err)
}

// backup puts a copy of the history's database into the backup instead of the files in use. If the
// copy fails, the backup of the application continues without it.
func (h history) backup(e *core.BackupEvent) error {
	path, snapshot, err := h.notifier.SnapshotHistory(e.Context)
	if err != nil {
		e.App.Logger().Error("A backup is made without the history of topics", slog.String("backup", e.Name), slog.String("error", err.Error()))
	}
	if snapshot != "" {
		defer os.Remove(snapshot)
	}
	if within, err := filepath.Rel(e.App.DataDir(), path); err == nil {
		for _, suffix := range []string{"", "-wal", "-shm"} {
			e.Exclude = append(e.Exclude, within+suffix)
		}
	}
	return e.Next()
}
