// Tokens: a request's token is verified, and its auth record read, once for as long as nothing is
// written to the database. That is half of what a small request costs.

package hooks

import (
	"context"
	"database/sql"
	"strings"
	"sync"
	"time"

	"github.com/pocketbase/dbx"
	"github.com/pocketbase/pocketbase/apis"
	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/hook"
	"github.com/pocketbase/pocketbase/tools/security"
)

// maxTokens is how many tokens are remembered: those of all who come back at once, 2 KiB each. The next
// write to the database makes them forgotten.
const maxTokens = 10_000

// tokenVersionKey is the key under which a request keeps the version of the database before its
// token was verified.
const tokenVersionKey = "heraldTokenVersion"

// tokens remembers who tokens belong to. Nothing can be stale: before each use it asks SQLite whether
// anything has been committed since, by whatever code or process ("PRAGMA data_version" of a
// connection that writes nothing, see https://sqlite.org/pragma.html#pragma_data_version).
type tokens struct {
	app core.App

	mu      sync.Mutex // guards the fields below; held during the question, which reads shared memory only
	db      *sql.DB    // of conn
	conn    *sql.Conn
	ask     *sql.Stmt
	version databaseVersion
	known   map[string]knownToken
	closed  bool
}

// databaseVersion changes with each commit. Numbers of two connections cannot be compared.
type databaseVersion struct{ connection, number int64 }

type knownToken struct {
	record     *core.Record // never handed out itself
	collection *core.Collection
	expires    time.Time
}

// bindTokens adds middlewares before and after PocketBase's own, which accepts what the one before
// has found.
func bindTokens(app core.App) {
	t := &tokens{app: app, known: map[string]knownToken{}}
	app.OnServe().Bind(&hook.Handler[*core.ServeEvent]{
		Id: "heraldTokens",
		Func: func(e *core.ServeEvent) error {
			e.Router.Bind(&hook.Handler[*core.RequestEvent]{
				Id:       "heraldKnownToken",
				Priority: apis.DefaultLoadAuthTokenMiddlewarePriority - 1,
				Func: func(e *core.RequestEvent) error {
					t.find(e)
					return e.Next()
				},
			}, &hook.Handler[*core.RequestEvent]{
				Id:       "heraldKnowToken",
				Priority: apis.DefaultLoadAuthTokenMiddlewarePriority + 1,
				Func: func(e *core.RequestEvent) error {
					if version, isNew := e.Get(tokenVersionKey).(databaseVersion); isNew && e.Auth != nil {
						t.remember(tokenOf(e), e.Auth, version)
					}
					return e.Next()
				},
			})
			return e.Next()
		},
	})
	app.OnTerminate().Bind(&hook.Handler[*core.TerminateEvent]{
		Id: "heraldTokens",
		Func: func(e *core.TerminateEvent) error {
			t.close()
			return e.Next()
		},
	})
}

// tokenOf returns the token of a request as PocketBase's loadAuthToken does.
func tokenOf(e *core.RequestEvent) string {
	token := e.Request.Header.Get("Authorization")
	if len(token) > 7 && strings.EqualFold(token[:7], "Bearer ") {
		return token[7:]
	}
	return token
}

// find sets the request's auth record if its token is known. Only Herald's own requests are
// concerned.
func (t *tokens) find(e *core.RequestEvent) {
	path := e.Request.URL.Path
	if e.Auth != nil || path != "/api/realtime" && path != "/api/notify" && !strings.HasPrefix(path, "/api/notify/") {
		return
	}
	token := tokenOf(e)
	if token == "" {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	version, ok := t.ofDatabase()
	if !ok {
		return
	}
	known, isKnown := t.known[token]
	if isKnown && time.Now().Before(known.expires) {
		// the cached collections are loaded after the commit that changed them
		if collection, err := t.app.FindCachedCollectionByNameOrId(known.collection.Id); err == nil && collection == known.collection {
			e.Auth = known.record.Fresh()
			return
		}
	}
	e.Set(tokenVersionKey, version)
}

// remember keeps who token belongs to, which was found out after version was asked for.
func (t *tokens) remember(token string, record *core.Record, version databaseVersion) {
	claims, err := security.ParseUnverifiedJWT(token)
	if err != nil {
		return // a token of the application's own
	}
	expires, err := claims.GetExpirationTime()
	if err != nil || expires == nil {
		return
	}
	if id, _ := claims[core.TokenClaimId].(string); id != record.Id {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed || version != t.version {
		return
	}
	if len(t.known) >= maxTokens {
		clear(t.known)
	}
	t.known[token] = knownToken{record.Fresh(), record.Collection(), expires.Time}
}

// ofDatabase returns the version of the database, and forgets what was known of another one. mu is
// held.
func (t *tokens) ofDatabase() (version databaseVersion, ok bool) {
	if t.closed {
		return version, false
	}
	builder, isDB := t.app.ConcurrentDB().(*dbx.DB)
	if !isDB {
		return version, false
	}
	if db := builder.DB(); t.conn == nil || db != t.db {
		t.release()
		if !t.connect(db) {
			return version, false
		}
	}
	version.connection = t.version.connection
	if err := t.ask.QueryRow().Scan(&version.number); err != nil {
		t.release()
		return version, false
	}
	if version != t.version {
		t.version = version
		clear(t.known)
	}
	return version, true
}

func (t *tokens) connect(db *sql.DB) bool {
	ctx := context.Background()
	conn, err := db.Conn(ctx)
	if err != nil {
		return false
	}
	ask, err := conn.PrepareContext(ctx, "PRAGMA data_version")
	if err != nil {
		conn.Close()
		return false
	}
	t.db, t.conn, t.ask = db, conn, ask
	t.version.connection++
	return true
}

func (t *tokens) release() {
	if t.conn != nil {
		t.ask.Close()
		t.conn.Close()
	}
	t.db, t.conn, t.ask = nil, nil, nil
	clear(t.known)
}

func (t *tokens) close() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.closed = true
	t.release()
}
