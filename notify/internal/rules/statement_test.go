package rules_test

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/ganigeorgiev/fexpr"
	"github.com/pocketbase/dbx"
	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/search"
	"github.com/pocketbase/pocketbase/tools/types"

	"herald/internal/pbtest"
	"herald/internal/seed"
	"herald/notify/internal/rules"
)

// modelRules are rules of all kinds, of a pattern with {room} and {path...}.
var modelRules = []string{
	`@request.auth.id != ""`,
	`@request.auth.id = @request.query.room`,
	`@request.auth.email = @request.query.room || @request.auth.email = ""`,
	`@request.auth.email:lower = "ann@example.com"`,
	`@request.auth.verified = true`,
	`@request.auth.verified = true && @request.query.room = "1"`,
	`@request.auth.collectionName = "users" && @request.auth.collectionId != ""`,
	`@request.auth.name = @request.query.room`,
	`@request.auth.name ~ @request.query.room`,
	`@request.query.room ~ "1"`,
	`@request.query.room > 1`,
	`@request.query.room:isset = true`,
	`@request.query.room = pattern`,
	`@request.query.path = "" || @request.query.path = "b"`,
	`@request.auth.friends ?= @request.query.room`,
	`@request.auth.friends.name ?= @request.query.room`,
	`@request.auth.friends:length > 0`,
	`@request.auth.friends:each != @request.query.room`,
	`@request.auth.members_via_user.room ?= @request.query.room`,
	`@collection.members.user ?= @request.auth.id && @collection.members.room ?= @request.query.room`,
	`@collection.members.user = @request.auth.id && @collection.members.room = @request.query.room`,
	`@collection.members.user ?= @request.auth.id && @collection.members.room ?= @request.query.room && @collection.members.role ?= "admin"`,
	`@request.auth.verified != true || (@collection.members:a.user ?= @request.auth.id && @collection.members:b.room ?!= @request.query.room)`,
	`@collection.members.user.name ?= @request.query.room`,
	`@collection.members.user ?= @request.auth.id && @collection.members.user.verified ?= true`,
	`@collection.members.until ?> @now && @collection.members.user ?= @request.auth.id`,
	`@collection.members.user ?!= @request.auth.id`,
	`@request.headers.x_key = "1"`,
	`@request.auth.missing = @request.query.room`,
	`maxSize > 10 && @request.method = "GET" && @request.context = "realtime"`,
}

// TestPassesLikePocketBase: whatever the rule, the user, the topic and the data, the answer is that
// of PocketBase, which builds and sends its query each time; also while members, users and
// collections change.
func TestPassesLikePocketBase(t *testing.T) {
	random := rand.New(rand.NewPCG(seed.Of(t), 0))
	app := pbtest.NewApp(t)
	pbtest.AddField(t, app, "users", &core.RelationField{Name: "friends", CollectionId: collection(t, app, "users").Id, MaxSelect: 9})
	staff := core.NewAuthCollection("staff")
	members := core.NewBaseCollection("members")
	members.Fields.Add(
		&core.RelationField{Name: "user", CollectionId: collection(t, app, "users").Id},
		&core.TextField{Name: "room"}, &core.SelectField{Name: "role", Values: []string{"admin", "guest"}}, &core.DateField{Name: "until"},
	)
	former := core.NewBaseCollection("former")
	former.Fields = members.Fields
	channels := core.NewBaseCollection("channels")
	channels.Fields.Add(&core.TextField{Name: "pattern"}, &core.NumberField{Name: "maxSize"})
	for _, c := range []*core.Collection{staff, members, former, channels} {
		save(t, app, c)
	}
	channel := core.NewRecord(channels)
	channel.Load(map[string]any{"pattern": "1", "maxSize": 20})
	save(t, app, channel)

	var auths []*core.Record
	for i, name := range []string{"users", "users", "users", "staff"} {
		auths = append(auths, pbtest.AddAuth(t, app, name, fmt.Sprintf("user%d@example.com", i), map[string]any{"verified": i%2 == 0, "name": fmt.Sprint(i)}))
	}
	superuser := pbtest.AddAuth(t, app, core.CollectionNameSuperusers, "root@example.com", nil)
	rooms := []string{"1", "2", "10", "1e1", "user1@example.com", "'; --", "%", "_", auths[0].Id}

	change := func() {
		switch random.IntN(8) {
		case 0, 1:
			m := core.NewRecord(collection(t, app, []string{"members", "former"}[random.IntN(2)]))
			m.Load(map[string]any{"user": auths[random.IntN(3)].Id, "room": rooms[random.IntN(len(rooms))], "role": "admin",
				"until": types.NowDateTime().Add(time.Duration(random.IntN(3)-1) * time.Hour)})
			save(t, app, m)
		case 2:
			if m, err := app.FindFirstRecordByFilter("members", "role = 'admin'"); err == nil {
				if err := app.Delete(m); err != nil {
					t.Fatal(err)
				}
			}
		case 3:
			user := current(t, app, auths[random.IntN(len(auths))])
			user.Set("name", rooms[random.IntN(len(rooms))])
			user.SetVerified(!user.Verified())
			if user.Collection().Name == "users" {
				user.Set("friends", []string{auths[random.IntN(3)].Id})
				user.SetEmail([]string{"", user.Id + "@example.com"}[random.IntN(2)])
			}
			if err := app.SaveNoValidate(user); err != nil {
				t.Fatal(err)
			}
		case 4: // by the way of no hook
			if _, err := app.NonconcurrentDB().Update("members", dbx.Params{"room": rooms[random.IntN(len(rooms))]}, dbx.HashExp{"role": "admin"}).Execute(); err != nil {
				t.Fatal(err)
			}
		case 5:
			c := collection(t, app, members.Id)
			c.Indexes = nil
			c.AddIndex(fmt.Sprint("idx_", random.IntN(3)), false, "room, user", "")
			if random.IntN(2) == 0 {
				c.Fields.Add(&core.TextField{Name: fmt.Sprint("extra", random.IntN(3))})
			}
			save(t, app, c)
		case 6: // another collection takes the name
			one, other := collection(t, app, "members"), collection(t, app, "former")
			one.Indexes, other.Indexes = nil, nil
			for _, next := range []struct {
				*core.Collection
				name string
			}{{one, "between"}, {other, "members"}, {one, "former"}} {
				next.Name = next.name
				save(t, app, next.Collection)
			}
		case 7:
			c := collection(t, app, staff.Id)
			c.Name = []string{"staff", "personnel"}[random.IntN(2)]
			save(t, app, c)
		}
	}

	statements := rules.NewStatements(app)
	passed := map[bool]int{}
	var compiled []*rules.Rule
	for _, text := range modelRules {
		rule, err := rules.Compile(app, channels, text, []string{"room", "path"})
		if err != nil {
			t.Fatalf("%s: %v", text, err)
		}
		compiled = append(compiled, rule)
	}
	for range 60 {
		change()
		for i, rule := range compiled {
			for range 3 {
				auth := append(auths, superuser, nil)[random.IntN(len(auths)+2)]
				if auth != nil {
					auth = current(t, app, auth)
				}
				info := &core.RequestInfo{
					Context: core.RequestInfoContextRealtime, Method: "GET", Body: map[string]any{}, Auth: auth,
					Query:   map[string]string{"room": rooms[random.IntN(len(rooms))], "path": []string{"", "b"}[random.IntN(2)]},
					Headers: map[string]string{"x_key": fmt.Sprint(random.IntN(2))},
				}
				want, wantErr := app.CanAccessRecord(channel, info, rule.Filter)
				got, err := statements.Passes(rule, channel, info.Auth, info.Query, info.Headers)
				if got != want || (err != nil) != (wantErr != nil) {
					t.Fatalf("%s\nquery %v, auth %v: got %t, %v; PocketBase says %t, %v", modelRules[i], info.Query, auth, got, err, want, wantErr)
				}
				passed[got]++
			}
		}
	}
	if passed[true] < 500 || passed[false] < 500 {
		t.Errorf("passed: %v, so little was tried", passed)
	}
	for i, rule := range compiled {
		if text := modelRules[i]; rules.IsPrepared(rule) == rules.IsUnsteady(text) {
			t.Errorf("prepared: %t: %s", rules.IsPrepared(rule), text)
		}
	}
}

// TestOwnFunction: what a function that the application adds to PocketBase's returns is not kept.
func TestOwnFunction(t *testing.T) {
	app := pbtest.NewApp(t)
	channels := core.NewBaseCollection("channels")
	save(t, app, channels)
	channel := core.NewRecord(channels)
	save(t, app, channel)
	gate := "open"
	search.TokenFunctions["gate"] = func(func(fexpr.Token) (*search.ResolverResult, error), ...fexpr.Token) (*search.ResolverResult, error) {
		return &search.ResolverResult{Identifier: "{:gate}", Params: dbx.Params{"gate": gate}}, nil
	}
	defer delete(search.TokenFunctions, "gate")
	rule, err := rules.Compile(app, channels, `gate("x") = "open"`, nil)
	if err != nil {
		t.Fatal(err)
	}
	statements := rules.NewStatements(app)
	for _, gate = range []string{"open", "closed"} {
		if passes, err := statements.Passes(rule, channel, nil, nil, nil); err != nil || passes != (gate == "open") {
			t.Errorf("%s: %t %v", gate, passes, err)
		}
	}
}

func current(t *testing.T, app core.App, record *core.Record) *core.Record {
	t.Helper()
	found, err := app.FindRecordById(record.Collection().Id, record.Id)
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func collection(t *testing.T, app core.App, name string) *core.Collection {
	t.Helper()
	c, err := app.FindCollectionByNameOrId(name)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func save(t *testing.T, app core.App, model core.Model) {
	t.Helper()
	if err := app.Save(model); err != nil {
		t.Fatal(err)
	}
}
