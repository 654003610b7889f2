// Prepared rules: most of what a rule costs is that PocketBase builds its query anew each time, and
// SQLite compiles it anew. Most rules have the same query for all users and topics but for a few
// values. Such a query is built by PocketBase once, and prepared once.
//
// Nothing is remembered of what a rule answered: the database answers each time.

package rules

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ganigeorgiev/fexpr"
	"github.com/pocketbase/dbx"
	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/search"
	"github.com/pocketbase/pocketbase/tools/security"
)

// Statements are the prepared statements of an application's rules. They may be used concurrently.
type Statements struct {
	app core.App

	mu     sync.Mutex // guards the fields below
	db     *sql.DB    // of the statements
	byText map[string]*sql.Stmt
}

// maxStatements is how many statements are kept. Beyond that, all are prepared anew: those of
// rules that were changed are no longer used.
const maxStatements = 500

// NewStatements returns the statements of app's rules.
func NewStatements(app core.App) *Statements {
	return &Statements{app: app, byText: map[string]*sql.Stmt{}}
}

// plan is the query of a rule for the users of one kind.
type plan struct {
	channels *core.Collection // as it was; any change of a collection makes PocketBase load all anew
	parts    []string         // the SQL between the values
	values   []value          // one less than the parts

	text    string      // the SQL with a question mark for each value
	isQuick atomic.Bool // it was answered at once the last time
}

// value is one that the query binds.
type value struct {
	source source
	name   string // of the wildcard
	fixed  any    // in the rule's text
}

type source int

const (
	fromRule source = iota
	fromID          // of the auth record
	fromEmail
	fromWildcard
)

// kind is what the text of a rule's query depends on: of all auth fields, PocketBase reads only these, the
// id and the e-mail address from the auth record (plainRequestAuthFields in its core package), and the
// others from the database.
type kind struct {
	collection             *core.Collection // nil for a guest
	isVerified, showsEmail bool
}

// quickAnswer is the time below which a rule's query is not expected to need a timeout.
const quickAnswer = 10 * time.Millisecond

// maxPlans is how many kinds of users a rule is prepared for.
const maxPlans = 50

// Passes reports whether auth passes the rule of record, as [core.App]'s CanAccessRecord does. query is what the
// rule sees as @request.query, and headers as @request.headers.
func (s *Statements) Passes(r *Rule, record, auth *core.Record, query, headers map[string]string) (bool, error) {
	info := requestInfo(auth, query, headers)
	if r.Filter != nil && *r.Filter != "" && !info.HasSuperuserAuth() {
		if p := s.planOf(r, record, info.Auth); p != nil {
			if args, ok := p.args(info); ok {
				if passes, err := s.ask(p, args); err == nil {
					return passes, nil
				} // else PocketBase tries, and reports what is wrong
			}
		}
	}
	return s.app.CanAccessRecord(record, info, r.Filter)
}

// requestInfo is what a rule sees, of a real request and of a sample.
func requestInfo(auth *core.Record, query, headers map[string]string) *core.RequestInfo {
	return &core.RequestInfo{
		Context: core.RequestInfoContextRealtime,
		Method:  "GET",
		Query:   query,
		Headers: headers,
		Body:    map[string]any{},
		Auth:    auth,
	}
}

// planOf returns the plan of a rule for users like auth, or nil if it has to be built each time.
func (s *Statements) planOf(r *Rule, record, auth *core.Record) *plan {
	if !r.isSteady {
		return nil
	}
	channels, err := s.app.FindCachedCollectionByNameOrId(record.Collection().Id)
	if err != nil {
		return nil
	}
	k := kind{}
	if auth != nil {
		k = kind{auth.Collection(), auth.Verified(), auth.EmailVisibility()}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	known, ok := r.plans[k]
	if ok && (known == nil || known.channels == channels) {
		return known
	}
	if len(r.plans) >= maxPlans {
		clear(r.plans)
	}
	if r.plans == nil {
		r.plans = map[kind]*plan{}
	}
	known = newPlan(s.app, r, record, auth)
	if known != nil {
		known.channels = channels
	}
	r.plans[k] = known
	return known
}

// newPlan builds the query of a rule for two users and topics that nobody else has. Where the two queries
// differ in nothing but these values, it is the same for all. Otherwise newPlan returns nil.
func newPlan(app core.App, r *Rule, record, auth *core.Record) *plan {
	db, ok := app.ConcurrentDB().(*dbx.DB)
	if !ok {
		return nil
	}
	var plans [2]*plan
	for i := range plans {
		built, err := newSample(r, auth).build(app, db, r, record)
		if err != nil {
			return nil
		}
		plans[i] = built
		for _, v := range built.values {
			if auth != nil && v.fixed != "" && (v.fixed == auth.Id || v.fixed == auth.Email()) {
				return nil // nobody else is ever to be taken for this user
			}
		}
	}
	if !slices.Equal(plans[0].parts, plans[1].parts) || !slices.Equal(plans[0].values, plans[1].values) {
		return nil
	}
	plans[0].text = strings.Join(plans[0].parts, "?")
	return plans[0]
}

// sample is a user and a topic with values that occur nowhere else.
type sample struct {
	info   *core.RequestInfo
	values map[string]value
}

func newSample(r *Rule, auth *core.Record) *sample {
	s := &sample{requestInfo(nil, map[string]string{}, nil), map[string]value{}}
	unique := func(v value) string {
		text := security.RandomString(40)
		s.values[text] = v
		return text
	}
	for name := range r.Wildcards {
		s.info.Query[name] = unique(value{source: fromWildcard, name: name})
	}
	if auth != nil {
		s.info.Auth = auth.Fresh()
		s.info.Auth.Set(core.FieldNameId, unique(value{source: fromID}))
		s.info.Auth.Set(core.FieldNameEmail, unique(value{source: fromEmail}))
	}
	return s
}

var (
	// what dbx replaces in a query's text (processSQL)
	placeholders = regexp.MustCompile(`\{:\w+\}`)
	quoted       = regexp.MustCompile(`\{\{[\w\-. ]+\}\}|\[\[[\w\-. ]+\]\]`)
	// the names with a random end that PocketBase gives to subqueries
	randomNames = regexp.MustCompile(`\b__(?:ml|mr|sm)[A-Za-z0-9]{8}\b`)
)

// build builds the query that CanAccessRecord makes for the sample.
func (s *sample) build(app core.App, db *dbx.DB, r *Rule, record *core.Record) (*plan, error) {
	query := app.RecordQuery(record.Collection()).
		Select("(1)").
		AndWhere(dbx.HashExp{record.Collection().Name + ".id": record.Id})
	resolver := core.NewRecordFieldResolver(app, record.Collection(), s.info, true)
	expr, err := search.FilterData(*r.Filter).BuildExpr(resolver)
	if err != nil {
		return nil, err
	}
	if err := resolver.UpdateQuery(query); err != nil {
		return nil, err
	}
	built := query.AndWhere(expr).Limit(1).Build()

	text := quoted.ReplaceAllStringFunc(built.SQL(), func(name string) string {
		if name[0] == '{' {
			return db.QuoteTableName(name[2 : len(name)-2])
		}
		return db.QuoteColumnName(name[2 : len(name)-2])
	})
	var names []string
	text = randomNames.ReplaceAllStringFunc(text, func(name string) string {
		i := slices.Index(names, name)
		if i < 0 {
			i = len(names)
			names = append(names, name)
		}
		return fmt.Sprintf("%s_%d", name[:len("__sm")], i)
	})
	p := &plan{}
	params := built.Params()
	end := 0
	for _, at := range placeholders.FindAllStringIndex(text, -1) {
		bound, ok := params[text[at[0]+2:at[1]-1]]
		if !ok {
			return nil, errors.New("a value is missing")
		}
		v := value{fixed: bound}
		switch bound := bound.(type) {
		case string:
			if own, isOwn := s.values[bound]; isOwn {
				v = own
			}
		case bool, float64, int, int64, nil:
		default:
			return nil, fmt.Errorf("a value of type %T", bound)
		}
		p.parts = append(p.parts, text[end:at[0]])
		p.values = append(p.values, v)
		end = at[1]
	}
	p.parts = append(p.parts, text[end:])
	return p, nil
}

// args returns the values that the query binds for a request. ok is false if one is empty: PocketBase builds other
// queries then.
func (p *plan) args(info *core.RequestInfo) (args []any, ok bool) {
	args = make([]any, len(p.values))
	for i, v := range p.values {
		text := ""
		switch v.source {
		case fromRule:
			args[i] = v.fixed
			continue
		case fromID:
			text = info.Auth.Id
		case fromEmail:
			text = info.Auth.Email()
		case fromWildcard:
			text = info.Query[v.name]
		}
		if text == "" {
			return nil, false
		}
		args[i] = text
	}
	return args, true
}

// ask asks the database.
func (s *Statements) ask(p *plan, args []any) (passes bool, err error) {
	db, ok := s.app.ConcurrentDB().(*dbx.DB)
	if !ok {
		return false, errors.ErrUnsupported
	}
	stmt, err := s.prepared(db.DB(), p.text)
	if err != nil {
		return false, err
	}
	ctx := context.Background()
	if !p.isQuick.Load() { // the timeout costs two goroutines, which is more than a quick answer
		var cancel func()
		ctx, cancel = context.WithTimeout(ctx, core.DefaultQueryTimeout)
		defer cancel()
	}
	began := time.Now()
	var one int
	err = stmt.QueryRowContext(ctx, args...).Scan(&one)
	took := time.Since(began)
	p.isQuick.Store(took < quickAnswer)
	if log := db.QueryLogFunc; log != nil {
		log(ctx, took, p.logText(args), nil, err)
	}
	if errors.Is(err, sql.ErrNoRows) {
		return false, nil
	}
	return one > 0, err
}

// logText returns the query as dbx logs it.
func (p *plan) logText(args []any) string {
	var b strings.Builder
	for i, part := range p.parts {
		b.WriteString(part)
		if i == len(args) {
			break
		}
		if text, isText := args[i].(string); isText {
			b.WriteString("'" + strings.ReplaceAll(text, "'", "''") + "'")
		} else {
			fmt.Fprint(&b, args[i])
		}
	}
	return b.String()
}

func (s *Statements) prepared(db *sql.DB, text string) (*sql.Stmt, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if db != s.db || len(s.byText) >= maxStatements {
		for _, stmt := range s.byText {
			stmt.Close()
		}
		s.db = db
		clear(s.byText)
	}
	if stmt := s.byText[text]; stmt != nil {
		return stmt, nil
	}
	stmt, err := db.Prepare(text)
	if err == nil {
		s.byText[text] = stmt
	}
	return stmt, err
}

// isSteady reports whether the query of a rule depends on nothing but the user and the topic: neither
// on the time (@now and others are values of their own) nor on headers.
func isSteady(r *Rule, channels *core.Collection, groups []fexpr.ExprGroup) bool {
	for name := range r.Wildcards {
		// PocketBase makes a number of its value (resolveStaticRequestField)
		if _, isNumber := channels.Fields.GetByName(name).(*core.NumberField); isNumber {
			return false
		}
	}
	if _, isNumber := channels.Fields.GetByName(core.FieldNameEmail).(*core.NumberField); isNumber {
		return false
	}
	return !r.LooksAtHeaders && !varies(groups)
}

func varies(groups []fexpr.ExprGroup) bool {
	return slices.ContainsFunc(groups, func(group fexpr.ExprGroup) bool {
		switch item := group.Item.(type) {
		case fexpr.Expr:
			return mayVary(item.Left) || mayVary(item.Right)
		case fexpr.ExprGroup:
			return varies([]fexpr.ExprGroup{item})
		case []fexpr.ExprGroup:
			return varies(item)
		}
		return true
	})
}

// mayVary reports whether token is, or has in it, a name of the kind of @now, or a function that the application
// has added to PocketBase's (search.TokenFunctions), which may do the same.
func mayVary(token fexpr.Token) bool {
	if token.Type == fexpr.TokenFunction && token.Literal != "geoDistance" && token.Literal != "strftime" {
		return true
	}
	if args, ok := token.Meta.([]fexpr.Token); ok && slices.ContainsFunc(args, mayVary) {
		return true
	}
	return token.Type == fexpr.TokenIdentifier && strings.HasPrefix(token.Literal, "@") &&
		!strings.HasPrefix(token.Literal, "@request.") && !strings.HasPrefix(token.Literal, "@collection.")
}
