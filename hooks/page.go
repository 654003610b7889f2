// What is served at /: the application's public folder, or Herald's page.

package hooks

import (
	"io/fs"
	"net/http"
	"os"

	"github.com/pocketbase/pocketbase/apis"
	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/hook"
)

// pageCSP lets the page load and call nothing but its own server.
const pageCSP = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; " +
	"base-uri 'none'; form-action 'self'; frame-ancestors 'none'"

// bindPage serves the public folder of the application, or else Herald's page,
// at every path that has no route yet.
func bindPage(app core.App, config Config) {
	app.OnServe().Bind(&hook.Handler[*core.ServeEvent]{
		Id: "heraldPage",
		Func: func(e *core.ServeEvent) error {
			if handler := static(config); handler != nil && !e.Router.HasRoute(http.MethodGet, "/{path...}") {
				e.Router.GET("/{path...}", handler)
			}
			return e.Next()
		},
		Priority: 999, // after everybody who may have a route of their own
	})
}

func static(config Config) func(*core.RequestEvent) error {
	if config.PublicDir != "" && (config.RequirePublicDir || isDir(config.PublicDir)) {
		return apis.Static(os.DirFS(config.PublicDir), config.IndexFallback)
	}
	if config.Page == nil {
		return nil
	}
	return page(config.Page)
}

// page serves Herald's own page with its content security policy.
func page(files fs.FS) func(*core.RequestEvent) error {
	serve := apis.Static(files, false)
	return func(e *core.RequestEvent) error {
		header := e.Response.Header()
		header.Set("Content-Security-Policy", pageCSP)
		header.Set("Referrer-Policy", "no-referrer")
		header.Set("Cache-Control", "no-cache") // a new executable may bring another page
		return serve(e)
	}
}

func isDir(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.IsDir()
}
