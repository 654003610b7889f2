package cli_test

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pocketbase/pocketbase/core"
	"github.com/spf13/cobra"

	"herald/hooks"
	"herald/hooks/internal/api"
	"herald/hooks/internal/cli"
	"herald/internal/pbtest"
	"herald/notify"
)

func TestMain(m *testing.M) { pbtest.Main(m) }

func TestSubscriptionsOf(t *testing.T) {
	for want, keys := range map[string][]string{
		"":                         nil,
		`a, b {"query":{"n":"1"}}`: {"a", "b?options=%7B%22query%22%3A%7B%22n%22%3A%221%22%7D%7D"},
		"a?options=%zz":            {"a?options=%zz"},
		"a \uFFFD[2J":              {"a?options=%1b[2J"},
	} {
		if got := cli.SubscriptionsOf(api.Client{Subscriptions: keys}); got != want {
			t.Errorf("%q instead of %q", got, want)
		}
	}
}

// printed is what a command prints.
type printed struct {
	*io.PipeReader
	lines *bufio.Scanner
}

// next returns the next line. It fails if none comes, or the command has ended.
func (p printed) next() (string, error) {
	late := time.AfterFunc(pbtest.Timeout, func() { p.CloseWithError(errors.New("nothing is printed")) })
	defer late.Stop()
	if !p.lines.Scan() {
		return "", cmp.Or(p.lines.Err(), io.EOF)
	}
	return p.lines.Text(), nil
}

// tail runs "tail" until the test ends. It returns when the command listens.
func tail(t *testing.T, app core.App, root *cobra.Command, address string, topics ...string) printed {
	t.Helper()
	root.SetArgs(append([]string{"notify", "tail", "--url", address}, topics...))
	out, in := io.Pipe()
	root.SetOut(in)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		in.CloseWithError(fmt.Errorf("the command has ended: %w", root.ExecuteContext(ctx)))
	}()
	t.Cleanup(func() {
		out.Close()
		cancel()
		<-ended
	})
	pbtest.WaitFor(t, "the command listens", func() bool { return len(notify.Of(app).Topics()) > len(topics) })
	return printed{out, bufio.NewScanner(out)}
}

// The token that "tail" makes for itself is good for two minutes: on a topic without
// history nothing may be lost when it ends.
func TestTailOutlivesItsToken(t *testing.T) {
	t.Parallel()
	const lasts = 3 * time.Second
	cli.SetTokenLasts(t, lasts)
	root := &cobra.Command{}
	app := pbtest.NewApp(t, func(app core.App) { hooks.MustRegister(app, root, hooks.Config{}) })
	pbtest.AddAuth(t, app, core.CollectionNameSuperusers, "root@x.com", nil)
	server := pbtest.Serve(t, app)

	out := tail(t, app, root, server.URL, "news")
	for began, sent := time.Now(), 0; time.Since(began) < 3*lasts; sent++ {
		if err := notify.Notify(app, "news", sent); err != nil {
			t.Fatal(err)
		}
		if line, err := out.next(); err != nil || !strings.Contains(line, `"news"`) {
			t.Fatal(line, err)
		}
	}
	if ended := notify.Of(app).Stats().Disconnects; len(ended) > 0 {
		t.Error("the connection ended: ", ended)
	}
}

// rudeProxy answers one request in the server's place. It is safe for concurrent use.
type rudeProxy struct {
	http.Handler

	mu    sync.Mutex // guards the fields below
	fate  string
	isHit func(*http.Request) bool
	ends  []context.CancelFunc
}

// next ends all requests there are, and answers the next one that isHit is true for.
func (p *rudeProxy) next(fate string, isHit func(*http.Request) bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.fate, p.isHit = fate, isHit
	for _, end := range p.ends {
		end()
	}
	p.ends = nil
}

// tracked returns r with a context that next ends.
func (p *rudeProxy) tracked(r *http.Request) *http.Request {
	p.mu.Lock()
	defer p.mu.Unlock()
	ctx, end := context.WithCancel(r.Context())
	p.ends = append(p.ends, end)
	return r.WithContext(ctx)
}

func (p *rudeProxy) isDone() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.isHit == nil
}

// take returns what becomes of r, or "" if it goes to the server.
func (p *rudeProxy) take(r *http.Request) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.isHit == nil || !p.isHit(r) {
		return ""
	}
	p.isHit = nil
	return p.fate
}

func (p *rudeProxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	switch fate := p.take(r); fate {
	case "":
		p.Handler.ServeHTTP(w, p.tracked(r))
	case "cut":
		w.Header().Set("Content-Length", "1000")
		_, _ = io.WriteString(w, `{"items":[{"data"`)
		panic(http.ErrAbortHandler)
	case "html":
		_, _ = io.WriteString(w, "<html><body>One moment, please</body></html>")
	case "JSON":
		w.Header().Set("Content-Type", "application/json")
		_, _ = io.WriteString(w, `{"error":"blocked"}`)
	default:
		var status int
		if _, err := fmt.Sscan(fate, &status); err != nil {
			panic(err)
		}
		w.WriteHeader(status)
		_, _ = io.WriteString(w, "<html><body>No</body></html>")
	}
}

// What something between the command and the server answers does not end the command, and costs no
// message of a topic with history.
func TestTailBehindProxies(t *testing.T) {
	for name, isHit := range map[string]func(*http.Request) bool{
		"stream":    func(r *http.Request) bool { return r.Method == http.MethodGet && r.URL.Path == "/api/realtime" },
		"history":   func(r *http.Request) bool { return r.URL.Path == "/api/notify/history" },
		"subscribe": func(r *http.Request) bool { return r.Method == http.MethodPost && r.URL.Path == "/api/realtime" },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel() // it waits before each attempt
			root := &cobra.Command{}
			app := pbtest.NewApp(t, func(app core.App) { hooks.MustRegister(app, root, hooks.Config{}) })
			pbtest.AddAuth(t, app, core.CollectionNameSuperusers, "root@x.com", nil)
			channels, err := app.FindCollectionByNameOrId("notify_channels")
			if err != nil {
				t.Fatal(err)
			}
			channel := core.NewRecord(channels)
			channel.Load(map[string]any{"pattern": "log", "history": 100})
			if err := app.Save(channel); err != nil {
				t.Fatal(err)
			}
			address, err := url.Parse(pbtest.Serve(t, app).URL)
			if err != nil {
				t.Fatal(err)
			}
			forward := httputil.NewSingleHostReverseProxy(address)
			forward.FlushInterval = -1
			rude := &rudeProxy{Handler: forward}
			proxy := httptest.NewServer(rude)
			t.Cleanup(proxy.Close)

			// a topic without history has no position, so that it is asked for again
			out := tail(t, app, root, proxy.URL, "log", "news")
			for sent, fate := range []string{"", "cut", "html", "JSON", "404"} {
				if sent > 0 { // until then a failure ends the command
					rude.next(fate, isHit)
					pbtest.WaitFor(t, "the proxy has answered with "+fate, rude.isDone)
				}
				if err := notify.Notify(app, "log", sent); err != nil {
					t.Fatal(err)
				}
				if line, err := out.next(); err != nil || !strings.Contains(line, fmt.Sprintf(`"seq":%d,`, sent+1)) {
					t.Fatalf("%s: %q (%v)", fate, line, err)
				}
			}
		})
	}
}
