// Tokens: a request's token is verified, and its auth record read, once for as long as neither the record nor
// its collection changes. That is half of what a small request costs.

package hooks

import (
	"cmp"
	"context"
	"crypto/sha256"
	"database/sql"
	"encoding/binary"
	"errors"
	"strings"
	"sync"
	"time"

	"github.com/pocketbase/dbx"
	"github.com/pocketbase/pocketbase/apis"
	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/hook"
	"github.com/pocketbase/pocketbase/tools/security"
)

// maxTokens is how many tokens are remembered, 2 KiB each with a usual record and maxKnownRow bytes more at most, and
// tokensAge for how long at least after their last use.
const (
	maxTokens   = 10_000
	maxKnownRow = 8 << 10
	tokensAge   = 10 * time.Minute
)

// The keys under which a request keeps the version of the database before its token was verified, and, if
// it is known, when the token expires.
const (
	tokenVersionKey = "heraldTokenVersion"
	tokenExpiryKey  = "heraldTokenExpiry"
)

// tokens remembers who tokens belong to. Nothing can be stale: before each use it asks SQLite whether
// anything has been committed since, by whatever code or process ("PRAGMA data_version" of a
// connection that writes nothing, see https://sqlite.org/pragma.html#pragma_data_version). If so, it compares the
// record's row.
type tokens struct {
	app core.App

	mu     sync.Mutex // guards the fields below; held during the question, which reads shared memory only
	db     *sql.DB    // of conn
	conn   *sql.Conn
	ask    *sql.Stmt
	number int64                          // of conn, which was the n-th
	rows   map[*core.Collection]*sql.Stmt // that read a record's row
	closed bool

	nextMu sync.Mutex // guards next
	next   *question  // that has not begun

	// those used since the turn, and those used in the time before it
	known, before map[string]*knownToken // guarded by mu, and so is turn
	turn          time.Time
}

// databaseVersion changes with each commit. Numbers of two connections cannot be compared.
type databaseVersion struct{ connection, number int64 }

type knownToken struct {
	record     *core.Record // never handed out itself
	collection *core.Collection
	row        rowHash // what the record was loaded from
	expires    time.Time
	version    databaseVersion // when that was so; guarded by the mutex of tokens
}

// bindTokens adds middlewares before and after PocketBase's own, which accepts what the one before
// has found.
func bindTokens(app core.App) {
	t := &tokens{app: app, known: map[string]*knownToken{}, rows: map[*core.Collection]*sql.Stmt{}}
	app.OnServe().Bind(&hook.Handler[*core.ServeEvent]{
		Id: "heraldTokens",
		Func: func(e *core.ServeEvent) error {
			router := e.Router
			// known at the first request only, when all are bound
			isPocketBases := sync.OnceValue(func() bool { return loadsTokensItself(router.Middlewares) })
			e.Router.Bind(&hook.Handler[*core.RequestEvent]{
				Id:       knownTokenID,
				Priority: apis.DefaultLoadAuthTokenMiddlewarePriority - 1,
				Func: func(e *core.RequestEvent) error {
					if isPocketBases() {
						t.find(e)
					}
					return e.Next()
				},
			}, &hook.Handler[*core.RequestEvent]{
				Id:       knowTokenID,
				Priority: apis.DefaultLoadAuthTokenMiddlewarePriority + 1,
				Func: func(e *core.RequestEvent) error {
					if version, isNew := e.Get(tokenVersionKey).(databaseVersion); isNew && e.Auth != nil {
						t.remember(bearerToken(e), e.Auth, version)
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

const (
	knownTokenID = "heraldKnownToken"
	knowTokenID  = "heraldKnowToken"
)

// loadsTokensItself reports whether PocketBase alone says who a token belongs to. A middleware of the application's
// in its place, or beside it, may know more, such as which sessions have ended.
func loadsTokensItself(middlewares []*hook.Handler[*core.RequestEvent]) bool {
	isThere := false
	for _, m := range middlewares {
		switch distance := m.Priority - apis.DefaultLoadAuthTokenMiddlewarePriority; {
		case m.Id == apis.DefaultLoadAuthTokenMiddlewareId:
			isThere = true
		case m.Id != knownTokenID && m.Id != knowTokenID && distance >= -1 && distance <= 1:
			return false
		}
	}
	return isThere
}

// find sets the request's auth record if its token is known. Only Herald's own requests are
// concerned.
func (t *tokens) find(e *core.RequestEvent) {
	path := e.Request.URL.Path
	if e.Auth != nil || path != "/api/realtime" && path != "/api/notify" && !strings.HasPrefix(path, "/api/notify/") {
		return
	}
	token := bearerToken(e)
	if token == "" {
		return
	}
	known, version, ok := t.recall(token)
	if !ok {
		return
	}
	if known != nil && t.isSame(known, version) {
		e.Auth = known.record.Fresh()
		e.Set(tokenExpiryKey, known.expires)
		return
	}
	e.Set(tokenVersionKey, version)
}

// recall returns what is known of token, or nil, and the version of the database. ok is false if the
// database did not tell.
func (t *tokens) recall(token string) (known *knownToken, version databaseVersion, ok bool) {
	if version, ok = t.askDatabase(); !ok {
		return nil, version, false
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if known = t.known[token]; known == nil {
		if known = t.before[token]; known != nil {
			t.keep(token, known)
		}
	}
	if known == nil || !time.Now().Before(known.expires) {
		return nil, version, true
	}
	// the cached collections are loaded after the commit that changed them
	if collection, err := t.app.FindCachedCollectionByNameOrId(known.collection.Id); err != nil || collection != known.collection {
		return nil, version, true
	}
	return known, version, true
}

// isSame reports whether the record of a known token has not changed, and remembers that for version.
func (t *tokens) isSame(known *knownToken, version databaseVersion) bool {
	t.mu.Lock()
	isSame := known.version == version
	t.mu.Unlock()
	if isSame {
		return true
	}
	row, err := t.rowOf(known.record)
	if err != nil || row != known.row {
		return false
	}
	t.mu.Lock()
	known.version = version // the row may be newer than that, never older
	t.mu.Unlock()
	return true
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
	row, err := t.rowOf(record)
	if err != nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	// else it may not be the row that the record was loaded from
	if now, ok := t.ofDatabase(); ok && now == version {
		t.keep(token, &knownToken{record.Fresh(), record.Collection(), row, expires.Time, version})
	}
}

// keep keeps a token as one that was just used. mu is held.
func (t *tokens) keep(token string, known *knownToken) {
	if now := time.Now(); len(t.known) >= maxTokens/2 || now.Sub(t.turn) > tokensAge {
		t.known, t.before = map[string]*knownToken{}, t.known
		t.turn = now
	}
	t.known[token] = known
}

// rowHash stands for the row of a record.
type rowHash [sha256.Size]byte

// errLargeRow says that a record is too large to be remembered.
var errLargeRow = errors.New("the record is large")

// rowOf returns what stands for the row of a record.
func (t *tokens) rowOf(record *core.Record) (hash rowHash, err error) {
	stmt, err := t.rowStatement(record.Collection())
	if err != nil {
		return hash, err
	}
	rows, err := stmt.Query(record.Id)
	if err != nil {
		return hash, err
	}
	defer rows.Close()
	columns, err := rows.Columns()
	if err != nil {
		return hash, err
	}
	values := make([]sql.RawBytes, len(columns))
	targets := make([]any, len(columns))
	for i := range values {
		targets[i] = &values[i]
	}
	if !rows.Next() {
		return hash, cmp.Or(rows.Err(), sql.ErrNoRows)
	}
	if err := rows.Scan(targets...); err != nil {
		return hash, err
	}
	var row []byte
	for _, value := range values {
		if value == nil {
			row = append(row, 0) // a value begins with more than its length
			continue
		}
		row = binary.AppendUvarint(row, uint64(len(value))+1)
		row = append(row, value...)
	}
	if len(row) > maxKnownRow {
		return hash, errLargeRow
	}
	return sha256.Sum256(row), rows.Err()
}

// rowStatement returns the statement that reads a row of a collection.
func (t *tokens) rowStatement(collection *core.Collection) (*sql.Stmt, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed || t.db == nil {
		return nil, sql.ErrConnDone
	}
	if stmt := t.rows[collection]; stmt != nil {
		return stmt, nil
	}
	if len(t.rows) >= maxRowStatements { // of collections as they were before a change
		t.closeRows()
	}
	stmt, err := t.db.Prepare("SELECT * FROM " + t.app.ConcurrentDB().QuoteSimpleTableName(collection.Name) + " WHERE id = ?")
	if err == nil {
		t.rows[collection] = stmt
	}
	return stmt, err
}

const maxRowStatements = 20

// closeRows closes the statements that read rows. mu is held.
func (t *tokens) closeRows() {
	for _, stmt := range t.rows {
		stmt.Close()
	}
	clear(t.rows)
}

// question is one to the database that many requests share.
type question struct {
	done    chan struct{} // closed when the fields below are set
	version databaseVersion
	ok      bool
}

// askDatabase returns the version of the database at a time after the call. All that call it while a question is
// under way share the next one.
func (t *tokens) askDatabase() (databaseVersion, bool) {
	t.nextMu.Lock()
	q := t.next
	isOwn := q == nil
	if isOwn {
		q = &question{done: make(chan struct{})}
		t.next = q
	}
	t.nextMu.Unlock()
	if !isOwn {
		<-q.done
		return q.version, q.ok
	}
	defer close(q.done)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.nextMu.Lock()
	t.next = nil // whoever comes from now on may have come after a change
	t.nextMu.Unlock()
	q.version, q.ok = t.ofDatabase()
	return q.version, q.ok
}

// ofDatabase returns the version of the database. mu is held.
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
	version.connection = t.number
	if err := t.ask.QueryRow().Scan(&version.number); err != nil {
		t.release()
		return version, false
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
	t.number++
	return true
}

func (t *tokens) release() {
	if t.conn != nil {
		t.ask.Close()
		t.conn.Close()
	}
	t.closeRows()
	t.db, t.conn, t.ask = nil, nil, nil
	clear(t.known)
	clear(t.before)
}

func (t *tokens) close() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.closed = true
	t.release()
}
