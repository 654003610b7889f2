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

	"herald/hooks/internal/api"
	"herald/notify"
)

// defaultHistoryPage is how many messages a request gets if it does not set a limit.
const defaultHistoryPage = 100

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
			return e.Next()
		},
	})
	app.OnBackupCreate().Bind(&hook.Handler[*core.BackupEvent]{
		Id:   "heraldHistory",
		Func: h.backup,
	})
}

// page handles GET /api/notify/history.
func (h history) page(e *core.RequestEvent) error {
	began := time.Now()
	const failed = "Failed to load the history."
	query := e.Request.URL.Query()
	errs := validation.Errors{}
	from, err := notify.ParseStart(query.Get("since"), query.Get("rewind"))
	if err != nil {
		field := "since"
		if query.Get("since") == "" {
			field = "rewind"
		}
		errs[field] = validation.NewError("validation_invalid_position", err.Error())
	}
	limit := api.IntParam(e, "limit", defaultHistoryPage, errs)
	if len(errs) > 0 {
		return e.BadRequestError(failed, errs)
	}
	reader := publisherOf(e)
	reader.ClientIDs = notify.ParseClientIDs(query.Get("clientId"))
	page, err := h.notifier.History(e.Request.Context(), reader, query.Get("topic"), from, min(limit, notify.MaxHistoryPage))
	if err != nil {
		if isForbidden(err) {
			delayDenial(e, began)
			// the code distinguishes this refusal from one by a proxy
			return e.ForbiddenError(notify.DeniedMessage, validation.Errors{"topic": validation.NewError("validation_topic_forbidden", notify.DeniedMessage)})
		}
		return api.FieldsError(failed, err)
	}
	e.Response.Header().Set("Cache-Control", "no-store")
	return e.JSON(http.StatusOK, page)
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
