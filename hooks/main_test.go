package hooks_test

import (
	"sync"
	"testing"

	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tests"

	"herald/hooks"
	"herald/internal/pbtest"
)

func TestMain(m *testing.M) { pbtest.Main(m) }

// repeatedly calls f on another goroutine, until that returns false or stop is called.
func repeatedly(f func() bool) (stop func()) {
	stopped := make(chan struct{})
	var calling sync.WaitGroup
	calling.Go(func() {
		for {
			select {
			case <-stopped:
				return
			default:
			}
			if !f() {
				return
			}
		}
	})
	return func() {
		close(stopped)
		calling.Wait()
	}
}

func register(app core.App) { hooks.MustRegister(app, nil, hooks.Config{}) }

// world is an application with Herald, a superuser and two users.
type world struct {
	*tests.TestApp
	root, ann, bob *core.Record
}

// people has the records of a world.
var people = pbtest.Template(func(app core.App) error {
	for _, add := range []struct {
		collection, email string
		values            map[string]any
	}{
		{core.CollectionNameSuperusers, "root@x.com", nil},
		{"users", "ann@x.com", map[string]any{"name": "Ann"}},
		{"users", "bob@x.com", nil},
	} {
		if _, err := pbtest.TryAddAuth(app, add.collection, add.email, add.values); err != nil {
			return err
		}
	}
	return nil
})

func newWorld(t testing.TB) *world {
	app := pbtest.NewAppFrom(t, people, register)
	find := func(collection, email string) *core.Record {
		record, err := app.FindAuthRecordByEmail(collection, email)
		if err != nil {
			t.Fatal(err)
		}
		return record
	}
	return &world{TestApp: app, root: find(core.CollectionNameSuperusers, "root@x.com"), ann: find("users", "ann@x.com"), bob: find("users", "bob@x.com")}
}
