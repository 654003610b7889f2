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
			for _, name := range moduleFiles {
				if config.Page != nil && !e.Router.HasRoute(http.MethodGet, "/"+name) {
					e.Router.GET("/"+name, module(config, name))
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

// moduleFiles are the files of Herald that applications import in the browser. They are also served
// beside an application's own public folder.
var moduleFiles = []string{"herald.js", "herald.d.ts"}

// module serves one of moduleFiles, or the file of that name in the public folder.
func module(config Config, name string) func(*core.RequestEvent) error {
	return func(e *core.RequestEvent) error {
		e.Response.Header().Set("Cache-Control", "no-cache")
		if strings.HasSuffix(name, ".ts") { // otherwise it is taken for a video
			e.Response.Header().Set("Content-Type", "text/plain; charset=utf-8")
		}
		if config.PublicDir != "" {
			if own := os.DirFS(config.PublicDir); isFile(own, name) {
				return e.FileFS(own, name)
			}
		}
		return e.FileFS(config.Page, name)
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
