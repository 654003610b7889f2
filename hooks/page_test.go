package hooks_test

import (
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/pocketbase/pocketbase/core"

	"herald/hooks"
	"herald/internal/pbtest"
)

func TestPage(t *testing.T) {
	t.Parallel() // it waits most of the time
	page := fstest.MapFS{"index.html": {Data: []byte("the page")}, "app/main.js": {Data: []byte("script")},
		"lib/pocketbase.es.mjs": {Data: []byte("the SDK")}}
	folder := t.TempDir()
	if err := os.WriteFile(filepath.Join(folder, "index.html"), []byte("the application"), 0o600); err != nil {
		t.Fatal(err)
	}
	withOwn := t.TempDir()
	if err := os.WriteFile(filepath.Join(withOwn, "herald.js"), []byte("another module"), 0o600); err != nil {
		t.Fatal(err)
	}
	missing := filepath.Join(folder, "missing")

	for name, test := range map[string]struct {
		config hooks.Config
		path   string
		status int
		body   string
		csp    bool
	}{
		"page":                   {hooks.Config{Page: page, PublicDir: missing, IndexFallback: true}, "/", 200, "the page", true},
		"page's script":          {hooks.Config{Page: page, PublicDir: missing}, "/app/main.js", 200, "script", true},
		"page's missing script":  {hooks.Config{Page: page, PublicDir: missing, IndexFallback: true}, "/app/no.js", 404, "", true},
		"folder":                 {hooks.Config{Page: page, PublicDir: folder}, "/", 200, "the application", false},
		"folder, missing":        {hooks.Config{Page: page, PublicDir: folder}, "/x", 404, "", false},
		"folder, fallback":       {hooks.Config{Page: page, PublicDir: folder, IndexFallback: true}, "/x", 200, "the application", false},
		"folder that must be":    {hooks.Config{Page: page, PublicDir: missing, RequirePublicDir: true}, "/", 404, "", false},
		"no page":                {hooks.Config{}, "/", 404, "", false},
		"module":                 {hooks.Config{Page: page}, "/herald.js", 200, "export async function subscribe", false},
		"module beside a folder": {hooks.Config{Page: page, PublicDir: folder, IndexFallback: true}, "/herald.js", 200, "export async function subscribe", false},
		"types beside a folder":  {hooks.Config{Page: page, PublicDir: folder}, "/herald.d.ts", 200, "export function subscribe<", false},
		"module of the folder":   {hooks.Config{Page: page, PublicDir: withOwn}, "/herald.js", 200, "another module", false},
		"module without a page":  {hooks.Config{PublicDir: folder}, "/herald.js", 200, "export async function subscribe", false},
		"SDK beside a folder":    {hooks.Config{Page: page, PublicDir: folder}, "/herald/pocketbase.es.mjs", 200, "the SDK", false},
		"page's SDK":             {hooks.Config{Page: page}, "/lib/pocketbase.es.mjs", 200, "the SDK", true},
		"no SDK":                 {hooks.Config{PublicDir: folder}, "/herald/pocketbase.es.mjs", 404, "", false},
		"the api goes on":        {hooks.Config{Page: page}, "/api/health", 200, "API is healthy", false},
	} {
		t.Run(name, func(t *testing.T) {
			app := pbtest.NewApp(t, func(app core.App) { hooks.MustRegister(app, nil, test.config) })
			server := pbtest.Serve(t, app)
			response, err := server.Client().Get(server.URL + test.path)
			if err != nil {
				t.Fatal(err)
			}
			defer response.Body.Close()
			body, err := io.ReadAll(response.Body)
			if err != nil {
				t.Fatal(err)
			}
			if response.StatusCode != test.status || !strings.Contains(string(body), test.body) {
				t.Errorf("%d %s, want %d %s", response.StatusCode, body, test.status, test.body)
			}
			if got := strings.Contains(response.Header.Get("Content-Security-Policy"), "script-src 'self'"); got != test.csp {
				t.Errorf("content security policy %q", response.Header.Get("Content-Security-Policy"))
			}
		})
	}

	t.Run("routes of the application's own", func(t *testing.T) {
		app := pbtest.NewApp(t, func(app core.App) {
			hooks.MustRegister(app, nil, hooks.Config{Page: page})
			app.OnServe().BindFunc(func(e *core.ServeEvent) error {
				for _, path := range []string{"/{path...}", "/lib/{path...}"} {
					e.Router.GET(path, func(e *core.RequestEvent) error { return e.NoContent(http.StatusTeapot) })
				}
				return e.Next()
			})
		})
		server := pbtest.Serve(t, app)
		for _, path := range []string{"/x", "/lib/pocketbase.es.mjs"} {
			if status, _ := server.Do(t, "GET", path, "", nil); status != http.StatusTeapot {
				t.Errorf("%s: status %d", path, status)
			}
		}
	})
}
