package notify_test

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/pocketbase/dbx"
	"github.com/pocketbase/pocketbase/apis"
	"github.com/pocketbase/pocketbase/core"

	"herald/internal/pbtest"
	"herald/notify"
)

func TestAudience(t *testing.T) {
	app := pbtest.NewApp(t)
	pbtest.AddField(t, app, "users", &core.TextField{Name: "plan"})
	pbtest.AddField(t, app, "users", &core.RelationField{Name: "boss", CollectionId: "_pb_users_auth_", MaxSelect: 1})
	staff := core.NewAuthCollection("staff")
	staff.Fields.Add(&core.TextField{Name: "desk"})
	if err := app.Save(staff); err != nil {
		t.Fatal(err)
	}

	ann := pbtest.AddAuth(t, app, "users", "ann@x.com", map[string]any{"plan": "pro", "verified": true})
	bob := pbtest.AddAuth(t, app, "users", "bob@x.com", map[string]any{"plan": "free", "boss": ann.Id})
	// PocketBase's validation keeps ids apart between auth collections, its
	// database does not
	twin := pbtest.AddAuth(t, app, "staff", "twin@x.com", map[string]any{"desk": "7"})
	if _, err := app.DB().Update("staff", dbx.Params{"id": ann.Id}, dbx.HashExp{"id": twin.Id}).Execute(); err != nil {
		t.Fatal(err)
	}
	twin, err := app.FindRecordById("staff", ann.Id)
	if err != nil {
		t.Fatal(err)
	}
	root := pbtest.AddAuth(t, app, core.CollectionNameSuperusers, "root@x.com", nil)
	gone := pbtest.AddAuth(t, app, "users", "gone@x.com", map[string]any{"plan": "pro"})

	clients := map[string]*notify.Client{
		"guest":     connect(app, nil, "t"),
		"ann":       connect(app, ann, "t"),
		"ann-phone": connect(app, ann, "t"),
		"bob":       connect(app, bob, "t"),
		"twin":      connect(app, twin, "t"),
		"root":      connect(app, root, "t"),
		"elsewhere": connect(app, ann, "other"),
	}
	n := notify.New(app, notify.Config{})

	everybody := "ann ann-phone bob guest root twin"
	for name, test := range map[string]struct {
		to     notify.Audience
		except notify.Except
		want   string // the clients that get the message
	}{
		"no audience":                {want: everybody},
		"any":                        {to: notify.Audience{Auth: notify.AuthAny}, want: everybody},
		"guest":                      {to: notify.Audience{Auth: notify.AuthGuest}, want: "guest"},
		"user":                       {to: notify.Audience{Auth: notify.AuthUser}, want: "ann ann-phone bob twin"},
		"superuser":                  {to: notify.Audience{Auth: notify.AuthSuperuser}, want: "root"},
		"users":                      {to: notify.Audience{Users: []string{"users:" + ann.Id}}, want: "ann ann-phone"},
		"users by collection id":     {to: notify.Audience{Users: []string{staff.Id + ":" + twin.Id}}, want: "twin"},
		"users, several":             {to: notify.Audience{Users: []string{pbtest.Ref(bob), pbtest.Ref(twin)}}, want: "bob twin"},
		"users, unknown id":          {to: notify.Audience{Users: []string{"users:nobody"}}, want: ""},
		"users, empty list":          {to: notify.Audience{Users: []string{}}, want: ""},
		"collections":                {to: notify.Audience{Collections: []string{"users"}}, want: "ann ann-phone bob"},
		"collections, several":       {to: notify.Audience{Collections: []string{"staff", core.CollectionNameSuperusers}}, want: "root twin"},
		"collections, empty list":    {to: notify.Audience{Collections: []string{}}, want: ""},
		"clients":                    {to: notify.Audience{Clients: []string{clients["guest"].Id(), clients["bob"].Id(), "x"}}, want: "bob guest"},
		"clients, empty list":        {to: notify.Audience{Clients: []string{}}, want: ""},
		"filter":                     {to: notify.Audience{Filter: "plan = 'pro' && verified = true"}, want: "ann ann-phone"},
		"filter on hidden field":     {to: notify.Audience{Filter: "email ~ 'x.com' && tokenKey != ''"}, want: "ann ann-phone bob root twin"},
		"filter over a relation":     {to: notify.Audience{Filter: "boss.plan = 'pro'"}, want: "bob"},
		"filter over two":            {to: notify.Audience{Filter: "id = '" + ann.Id + "'"}, want: "ann ann-phone twin"},
		"filter of one collection":   {to: notify.Audience{Filter: "desk = '7'"}, want: "twin"},
		"filter with @collection":    {to: notify.Audience{Filter: "@collection.staff.id ?= id", Collections: []string{"users"}}, want: "ann ann-phone"},
		"filter that fits nobody":    {to: notify.Audience{Filter: "plan = 'gold'"}, want: ""},
		"filter on one who is gone":  {to: notify.Audience{Filter: "id = '" + gone.Id + "'"}, want: ""},
		"filter and guests":          {to: notify.Audience{Auth: notify.AuthGuest, Filter: "id != ''"}, want: ""},
		"all parts":                  {to: notify.Audience{Auth: notify.AuthUser, Users: []string{pbtest.Ref(ann), pbtest.Ref(bob)}, Collections: []string{"users"}, Filter: "plan = 'pro'", Clients: []string{clients["ann"].Id(), clients["bob"].Id()}}, want: "ann"},
		"users of other collections": {to: notify.Audience{Users: []string{pbtest.Ref(ann)}, Collections: []string{"staff"}}, want: ""},
		"except users":               {except: notify.Except{Users: []string{pbtest.Ref(ann)}}, want: "bob guest root twin"},
		"except clients":             {except: notify.Except{Clients: []string{clients["ann"].Id(), clients["guest"].Id()}}, want: "ann-phone bob root twin"},
		"to and except":              {to: notify.Audience{Collections: []string{"users"}}, except: notify.Except{Users: []string{pbtest.Ref(bob)}, Clients: []string{clients["ann"].Id()}}, want: "ann-phone"},
	} {
		t.Run(name, func(t *testing.T) {
			report, err := n.Send(t.Context(), notify.Message{Topic: "t", Data: 1, To: test.to, Except: test.except})
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for name, client := range clients {
				if len(received(client)) > 0 {
					got = append(got, name)
				}
			}
			slices.Sort(got)
			if strings.Join(got, " ") != test.want {
				t.Errorf("got by %q, want %q", strings.Join(got, " "), test.want)
			}
			if report.Matched != len(got) || report.Queued != len(got) || report.Dropped != 0 {
				t.Errorf("report %+v, want %d matched and queued", report, len(got))
			}
		})
	}

	t.Run("auth is read at the moment of sending", func(t *testing.T) {
		clients["ann"].Unset(apis.RealtimeClientAuthKey)
		defer clients["ann"].Set(apis.RealtimeClientAuthKey, ann)
		report, err := n.Send(t.Context(), notify.Message{Topic: "t", Data: 1, To: notify.Audience{Users: []string{pbtest.Ref(ann)}}})
		if err != nil || report.Matched != 1 {
			t.Fatalf("report %+v, error %v, want only the phone", report, err)
		}
		if len(received(clients["ann"])) != 0 || len(received(clients["ann-phone"])) != 1 {
			t.Error("the message went to the connection that is signed out")
		}
	})
}

func TestInvalidAudience(t *testing.T) {
	app := pbtest.NewApp(t)
	client := connect(app, nil, "t")
	n := notify.New(app, notify.Config{})

	for name, test := range map[string]struct {
		to     notify.Audience
		except notify.Except
		field  string
		kind   error
		detail string
	}{
		"auth":               {to: notify.Audience{Auth: "admin"}, field: "to.auth", kind: notify.ErrInvalidAudience, detail: "superuser"},
		"user without colon": {to: notify.Audience{Users: []string{"users:a", "b"}}, field: "to.users.1", kind: notify.ErrInvalidAudience, detail: "COLLECTION:RECORD_ID"},
		"user without id":    {to: notify.Audience{Users: []string{"users:"}}, field: "to.users.0", kind: notify.ErrInvalidAudience, detail: "COLLECTION:RECORD_ID"},
		"user's collection":  {to: notify.Audience{Users: []string{"nope:1"}}, field: "to.users.0", kind: notify.ErrInvalidAudience, detail: "nope"},
		"except":             {except: notify.Except{Users: []string{"nope:1"}}, field: "except.users.0", kind: notify.ErrInvalidAudience, detail: "nope"},
		"client":             {to: notify.Audience{Clients: []string{"x", ""}}, field: "to.clients.1", kind: notify.ErrInvalidAudience, detail: "empty"},
		"except client":      {except: notify.Except{Clients: []string{""}}, field: "except.clients.0", kind: notify.ErrInvalidAudience, detail: "empty"},
		"collection":         {to: notify.Audience{Collections: []string{"users", "nope"}}, field: "to.collections.1", kind: notify.ErrInvalidAudience, detail: "nope"},
		"no auth collection": {to: notify.Audience{Collections: []string{core.CollectionNameMFAs}}, field: "to.collections.0", kind: notify.ErrInvalidAudience, detail: "auth collection"},
		"filter syntax":      {to: notify.Audience{Filter: "plan ="}, field: "to.filter", kind: notify.ErrInvalidFilter},
		"filter field":       {to: notify.Audience{Filter: "plam = 1"}, field: "to.filter", kind: notify.ErrInvalidFilter, detail: "plam"},
		"filter on request":  {to: notify.Audience{Filter: "@request.auth.id = id"}, field: "to.filter", kind: notify.ErrInvalidFilter, detail: "@request.auth.id"},
		"filter length":      {to: notify.Audience{Filter: strings.Repeat("x", 3501)}, field: "to.filter", kind: notify.ErrInvalidFilter, detail: "3500"},
		"filter of a named collection": {to: notify.Audience{Filter: "verified = true && name = 'x'", Collections: []string{"users", core.CollectionNameSuperusers}},
			field: "to.filter", kind: notify.ErrInvalidFilter, detail: `"_superusers"`},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := n.Send(t.Context(), notify.Message{Topic: "t", Data: 1, To: test.to, Except: test.except})
			var errs notify.Errors
			if !errors.As(err, &errs) || !errors.Is(err, test.kind) {
				t.Fatalf("error %v, want %v", err, test.kind)
			}
			if len(errs) != 1 || errs[0].Field != test.field || !strings.Contains(errs[0].Detail, test.detail) {
				t.Errorf("errors %v, want field %q with %q", errs, test.field, test.detail)
			}
			if messages := received(client); len(messages) != 0 {
				t.Errorf("a refused message was sent: %v", messages)
			}
		})
	}
}

// TestFilterIsOneQuery counts the statements that a send with a filter causes.
func TestFilterIsOneQuery(t *testing.T) {
	app := pbtest.NewApp(t)
	n := notify.New(app, notify.Config{})
	for _, email := range []string{"a@x.com", "b@x.com", "c@x.com"} {
		connect(app, pbtest.AddAuth(t, app, "users", email, nil), "t")
	}
	connect(app, pbtest.AddAuth(t, app, core.CollectionNameSuperusers, "root@x.com", nil), "t")

	queries := pbtest.CountQueries(t, app)
	report, err := n.Send(t.Context(), notify.Message{Topic: "t", Data: 1, To: notify.Audience{Filter: "email != ''"}})
	if err != nil || report.Matched != 4 {
		t.Fatalf("report %+v, error %v", report, err)
	}
	if got := queries(); got != 1 {
		t.Errorf("%d queries, want 1", got)
	}
}
