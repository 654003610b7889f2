// Lists in the form of PocketBase's lists. Called by routes.go.

package api

import (
	"net/http"
	"strconv"

	validation "github.com/pocketbase/ozzo-validation/v4"
	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/search"
)

// RespondPage answers with the items that the query parameters page and perPage select, with
// PocketBase's own limits and in the form of its lists.
func RespondPage[T any](e *core.RequestEvent, items []T) error {
	errs := validation.Errors{}
	page := IntParam(e, search.PageQueryParam, 1, errs)
	perPage := IntParam(e, search.PerPageQueryParam, search.DefaultPerPage, errs)
	if len(errs) > 0 {
		return e.BadRequestError("Invalid paging.", errs)
	}
	perPage = min(perPage, search.MaxPerPage)
	totalPages := (len(items) + perPage - 1) / perPage

	selected := []T{}
	if page <= totalPages {
		first := (page - 1) * perPage
		selected = items[first:min(first+perPage, len(items))]
	}
	return e.JSON(http.StatusOK, search.Result{
		Items:      selected,
		Page:       page,
		PerPage:    perPage,
		TotalItems: len(items),
		TotalPages: totalPages,
	})
}

// IntParam returns the query parameter name. It returns fallback if the parameter is missing, 0 or
// less, as in PocketBase's lists.
func IntParam(e *core.RequestEvent, name string, fallback int, errs validation.Errors) int {
	raw := e.Request.URL.Query().Get(name)
	if raw == "" {
		return fallback
	}
	value, err := strconv.Atoi(raw)
	if err != nil {
		errs[name] = validation.NewError("validation_invalid_number", "must be a whole number")
		return fallback
	}
	if value <= 0 {
		return fallback
	}
	return value
}
