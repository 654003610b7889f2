package hooks_test

import (
	"database/sql"
	"fmt"
	"math/rand/v2"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pocketbase/dbx"
	"github.com/pocketbase/pocketbase/apis"
	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/hook"

	"herald/internal/pbtest"
	"herald/internal/seed"
)

// TestTokens: whatever changes users, their tokens and their collection, a request is answered as if
// its token was verified, and its user read, just now.
func TestTokens(t *testing.T) {
	t.Parallel()
	random := rand.New(rand.NewPCG(seed.Of(t), 0))
	w := newWorld(t)
	w.OnServe().BindFunc(func(e *core.ServeEvent) error {
		e.Router.GET("/api/notify/who", func(e *core.RequestEvent) error {
			if e.Auth == nil {
				return e.String(http.StatusOK, "a guest")
			}
			who := fmt.Sprint(e.Auth.Collection().Name, " ", e.Auth.Id, " ", e.Auth.GetString("name"), " ", e.Auth.IsNew())
			e.Auth.Set("name", "changed by a handler")
			return e.String(http.StatusOK, who)
		})
		return e.Next()
	})
	server := pbtest.Serve(t, w)
	other, err := sql.Open("sqlite", filepath.Join(w.DataDir(), "data.db")) // as another process has it
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()

	users := map[string]*core.Record{"ann": w.ann, "bob": w.bob}
	held := map[string]string{}
	for name, user := range users {
		held[name] = pbtest.Token(t, user)
	}
	short, err := w.ann.NewStaticAuthToken(2 * time.Second)
	if err != nil {
		t.Fatal(err)
	}
	held["short"] = short
	held["nonsense"] = "nonsense"
	held["root"] = pbtest.Token(t, w.root)

	check := func(what string) {
		t.Helper()
		for name, token := range held {
			for _, header := range []string{token, "Bearer " + token} {
				want := "a guest"
				if record, err := w.FindAuthRecordByToken(token, core.TokenTypeAuth); err == nil {
					want = fmt.Sprint(record.Collection().Name, " ", record.Id, " ", record.GetString("name"), " false")
				}
				_, got := server.DoText(t, http.MethodGet, "/api/notify/who", header, nil)
				if got != want && name != "short" { // whose end may be between the two
					t.Fatalf("%s: %s is %q, want %q", what, name, got, want)
				}
			}
		}
	}
	fresh := func(name string) *core.Record {
		record, err := w.FindRecordById(users[name].Collection().Id, users[name].Id)
		if err != nil {
			return nil
		}
		return record
	}
	mustDo := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	raw := func(query string, args ...any) {
		t.Helper()
		_, err := other.Exec("PRAGMA busy_timeout = 5000; "+query, args...)
		mustDo(err)
	}
	steps := map[string]func(name string, i int){
		"another name": func(name string, i int) {
			if record := fresh(name); record != nil {
				record.Set("name", fmt.Sprint("name", i))
				save(t, w, record)
			}
		},
		"tokens revoked": func(name string, _ int) {
			if record := fresh(name); record != nil {
				record.RefreshTokenKey()
				save(t, w, record)
			}
		},
		"a new token": func(name string, _ int) {
			if record := fresh(name); record != nil {
				held[name] = pbtest.Token(t, record)
			}
		},
		"SQL of the application": func(name string, i int) {
			_, err := w.DB().Update(mustFind(t, w, users[name].Collection().Id).Name, dbx.Params{"name": fmt.Sprint("sql", i)}, dbx.HashExp{"id": users[name].Id}).Execute()
			mustDo(err)
		},
		"another process": func(name string, i int) {
			raw(`UPDATE "`+mustFind(t, w, users[name].Collection().Id).Name+`" SET name = ?, tokenKey = CASE WHEN ? THEN hex(randomblob(25)) || substr(id, 1, 0) || substr(?, 1, 0) ELSE tokenKey END WHERE id = ?`,
				fmt.Sprint("raw", i), i%3 == 0, i, users[name].Id)
		},
		"another secret": func(string, int) {
			collection := mustFind(t, w, w.ann.Collection().Id)
			collection.AuthToken.Secret = strings.Repeat("s", 40) + fmt.Sprint(random.IntN(1000))
			saveCollection(t, w, collection)
		},
		"another name of the collection": func(string, int) {
			collection := mustFind(t, w, w.ann.Collection().Id)
			collection.Name = fmt.Sprint("people", random.IntN(1_000_000))
			saveCollection(t, w, collection)
		},
		"a transaction that is rolled back": func(name string, _ int) {
			_ = w.RunInTransaction(func(tx core.App) error {
				if record := fresh(name); record != nil {
					record.RefreshTokenKey()
					mustDo(tx.Save(record))
				}
				return fmt.Errorf("no")
			})
		},
		"nothing": func(string, int) {},
	}
	names := []string{}
	for name := range steps {
		names = append(names, name)
	}
	check("at the beginning")
	for i := range 150 {
		step := names[random.IntN(len(names))]
		user := []string{"ann", "bob"}[random.IntN(2)]
		steps[step](user, i)
		check(fmt.Sprint(i, ": ", step, " of ", user))
	}
	pbtest.WaitFor(t, "the short token ends", func() bool {
		_, got := server.DoText(t, http.MethodGet, "/api/notify/who", short, nil)
		return got == "a guest"
	})
	mustDo(w.Delete(fresh("ann")))
	check("deleted")
}

// TestTokensAreKnown: a token that is known costs no query of PocketBase's, also where something else has been
// written since.
func TestTokensAreKnown(t *testing.T) {
	w := newWorld(t)
	server := pbtest.Serve(t, w)
	token := pbtest.Token(t, w.root)
	ask := func() {
		if status, text := server.DoText(t, http.MethodGet, "/api/notify/topics", token, nil); status != 200 {
			t.Fatalf("%d %s", status, text)
		}
	}
	ask()
	queries := pbtest.CountQueries(t, w)
	for i := range 10 {
		if _, err := w.NonconcurrentDB().Update("users", dbx.Params{"name": fmt.Sprint(i)}, dbx.HashExp{"id": w.ann.Id}).Execute(); err != nil {
			t.Fatal(err)
		}
		ask()
	}
	if count := queries(); count > 0 {
		t.Errorf("%d queries", count)
	}
}

// TestTokensChangedMeanwhile: a record that changes after PocketBase has read it is not remembered as it was.
func TestTokensChangedMeanwhile(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.OnServe().BindFunc(func(e *core.ServeEvent) error {
		e.Router.Bind(&hook.Handler[*core.RequestEvent]{
			Id:       "change",
			Priority: apis.DefaultLoadAuthTokenMiddlewarePriority, // behind it
			Func: func(e *core.RequestEvent) error {
				if name := e.Request.URL.Query().Get("name"); name != "" && e.Auth != nil {
					if _, err := w.NonconcurrentDB().Update("users", dbx.Params{"name": name}, dbx.HashExp{"id": e.Auth.Id}).Execute(); err != nil {
						return err
					}
				}
				return e.Next()
			},
		})
		e.Router.GET("/api/notify/who", func(e *core.RequestEvent) error {
			return e.String(http.StatusOK, e.Auth.GetString("name"))
		})
		return e.Next()
	})
	server := pbtest.Serve(t, w)
	token := pbtest.Token(t, w.ann)
	for i := range 5 {
		name := fmt.Sprint("name", i)
		server.DoText(t, http.MethodGet, "/api/notify/who?name="+name, token, nil)
		if _, got := server.DoText(t, http.MethodGet, "/api/notify/who", token, nil); got != name {
			t.Errorf("%q, want %q", got, name)
		}
	}
}

// TestTokensAtOnce: while many requests share the questions to the database, none that begins after a token was
// revoked is taken for its user.
func TestTokensAtOnce(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.OnServe().BindFunc(func(e *core.ServeEvent) error {
		e.Router.GET("/api/notify/who", func(e *core.RequestEvent) error {
			return e.String(http.StatusOK, fmt.Sprint(e.Auth != nil))
		})
		return e.Next()
	})
	server := pbtest.Serve(t, w)
	for range 10 {
		token := pbtest.Token(t, w.ann)
		var revoked, isOver atomic.Bool
		var known atomic.Int64
		var group sync.WaitGroup
		for range 16 {
			group.Go(func() {
				for !isOver.Load() {
					wasRevoked := revoked.Load()
					_, got := server.DoText(t, http.MethodGet, "/api/notify/who", token, nil)
					if got == "true" {
						known.Add(1)
					}
					if wasRevoked && got == "true" {
						t.Error("a revoked token counts")
					}
				}
			})
		}
		pbtest.WaitFor(t, "the token is known", func() bool { return known.Load() > 50 })
		w.ann.RefreshTokenKey()
		save(t, w, w.ann)
		revoked.Store(true)
		time.Sleep(5 * time.Millisecond) // of requests that may be wrong
		isOver.Store(true)
		group.Wait()
	}
}

// TestTokensOfOwnMiddleware: where the application itself says who a token belongs to, it is asked each time.
func TestTokensOfOwnMiddleware(t *testing.T) {
	t.Parallel()
	for name, replace := range map[string]bool{"in PocketBase's place": true, "beside it": false} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			var ended atomic.Bool
			w.OnServe().BindFunc(func(e *core.ServeEvent) error {
				if replace {
					e.Router.Unbind(apis.DefaultLoadAuthTokenMiddlewareId)
				}
				e.Router.Bind(&hook.Handler[*core.RequestEvent]{
					Id:       "own",
					Priority: apis.DefaultLoadAuthTokenMiddlewarePriority,
					Func: func(e *core.RequestEvent) error {
						if replace && e.Auth == nil {
							e.Auth, _ = e.App.FindAuthRecordByToken(e.Request.Header.Get("Authorization"), core.TokenTypeAuth)
						}
						if ended.Load() {
							e.Auth = nil
						}
						return e.Next()
					},
				})
				e.Router.GET("/api/notify/who", func(e *core.RequestEvent) error {
					return e.String(http.StatusOK, fmt.Sprint(e.Auth != nil))
				})
				return e.Next()
			})
			server := pbtest.Serve(t, w)
			token := pbtest.Token(t, w.ann)
			for i, want := range []string{"true", "true", "false"} {
				ended.Store(i == 2)
				if _, got := server.DoText(t, http.MethodGet, "/api/notify/who", token, nil); got != want {
					t.Errorf("%s, want %s", got, want)
				}
			}
		})
	}
}

// TestTokensOfLargeRecords: the token of a record that would take much memory is not remembered.
func TestTokensOfLargeRecords(t *testing.T) {
	w := newWorld(t)
	pbtest.AddField(t, w, "users", &core.TextField{Name: "notes", Max: 20_000})
	server := pbtest.Serve(t, w)
	for size, isKnown := range map[int]bool{1000: true, 10_000: false} {
		ann, err := w.FindRecordById("users", w.ann.Id)
		if err != nil {
			t.Fatal(err)
		}
		ann.Set("notes", strings.Repeat("x", size))
		save(t, w, ann)
		token := pbtest.Token(t, ann)
		ask := func() { server.DoText(t, http.MethodGet, "/api/notify/missing", token, nil) }
		ask()
		queries := pbtest.CountQueries(t, w)
		ask()
		if count := queries(); (count == 0) != isKnown {
			t.Errorf("%d bytes: %d queries", size, count)
		}
	}
}
