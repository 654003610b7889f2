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
			for name, files := range modules(config) {
				if isFile(files, name) && !e.Router.HasRoute(http.MethodGet, "/"+name) {
					e.Router.GET("/"+name, module(config, files, name))
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

// modules are the files that applications import in the browser, and what has them: Herald's client module and, where
// there is a page, the SDK that it uses. They are served beside whatever else is.
func modules(config Config) map[string]fs.FS {
	files := map[string]fs.FS{"herald.js": js.FS, "herald.d.ts": js.FS}
	if config.Page != nil {
		files["lib/pocketbase.es.mjs"] = config.Page
	}
	return files
}

// module serves a file of files, or the one of that name in the public folder.
func module(config Config, files fs.FS, name string) func(*core.RequestEvent) error {
	return func(e *core.RequestEvent) error {
		e.Response.Header().Set("Cache-Control", "no-cache")
		switch {
		case strings.HasSuffix(name, ".ts"): // otherwise it is taken for a video
			e.Response.Header().Set("Content-Type", "text/plain; charset=utf-8")
		case strings.HasSuffix(name, ".mjs"): // not every system knows it, and browsers insist
			e.Response.Header().Set("Content-Type", "text/javascript; charset=utf-8")
		}
		if config.PublicDir != "" {
			if own := os.DirFS(config.PublicDir); isFile(own, name) {
				return e.FileFS(own, name)
			}
		}
		return e.FileFS(files, name)
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
