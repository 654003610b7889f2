// What is served at /: the application's public folder or Herald's page, and the client module with
// either.

package hooks

import (
	"io/fs"
	"net/http"
	"os"
	"strings"

	"github.com/pocketbase/pocketbase/apis"
	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/hook"

	"herald/clients/js"
)

// pageCSP limits the page to loading from and calling its own server.
const pageCSP = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; " +
	"base-uri 'none'; form-action 'self'; frame-ancestors 'none'"

// bindPage serves the application's public folder, or else Herald's page, at every path without a
// route.
func bindPage(app core.App, config Config) {
	app.OnServe().Bind(&hook.Handler[*core.ServeEvent]{
		Id: "heraldPage",
		Func: func(e *core.ServeEvent) error {
			for path, m := range modules(config) {
				if isFile(m.files, m.name) && !e.Router.HasRoute(http.MethodGet, "/"+path) {
					e.Router.GET("/"+path, m.serve(config, path))
				}
			}
			if handler := static(config); handler != nil && !e.Router.HasRoute(http.MethodGet, "/{path...}") {
				e.Router.GET("/{path...}", handler)
			}
			return e.Next()
		},
		Priority: 999, // after all other code that may add routes
	})
}

// module is a file that applications import in the browser.
type module struct {
	files fs.FS
	name  string
}

// modules are Herald's client module and, where there is a page, the SDK that it uses, by path. They are served beside
// whatever else is, so their paths are Herald's own.
func modules(config Config) map[string]module {
	modules := map[string]module{"herald.js": {js.FS, "herald.js"}, "herald.d.ts": {js.FS, "herald.d.ts"}}
	if config.Page != nil {
		modules["herald/pocketbase.es.mjs"] = module{config.Page, "lib/pocketbase.es.mjs"}
	}
	return modules
}

// serve serves the module at path, or the file of the public folder there.
func (m module) serve(config Config, path string) func(*core.RequestEvent) error {
	return func(e *core.RequestEvent) error {
		e.Response.Header().Set("Cache-Control", "no-cache")
		switch {
		case strings.HasSuffix(path, ".ts"): // otherwise it is taken for a video
			e.Response.Header().Set("Content-Type", "text/plain; charset=utf-8")
		case strings.HasSuffix(path, ".mjs"): // not every system knows it, and browsers insist
			e.Response.Header().Set("Content-Type", "text/javascript; charset=utf-8")
		}
		if config.PublicDir != "" {
			if own := os.DirFS(config.PublicDir); isFile(own, path) {
				return e.FileFS(own, path)
			}
		}
		return e.FileFS(m.files, m.name)
	}
}

func isFile(files fs.FS, name string) bool {
	info, err := fs.Stat(files, name)
	return err == nil && info.Mode().IsRegular()
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
		header.Set("Cache-Control", "no-cache") // a new executable may contain another page
		return serve(e)
	}
}

func isDir(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.IsDir()
}
