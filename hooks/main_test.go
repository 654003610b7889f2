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

func newWorld(t testing.TB) *world {
	app := pbtest.NewApp(t, register)
	return &world{
		TestApp: app,
		root:    pbtest.AddAuth(t, app, core.CollectionNameSuperusers, "root@x.com", nil),
		ann:     pbtest.AddAuth(t, app, "users", "ann@x.com", map[string]any{"name": "Ann"}),
		bob:     pbtest.AddAuth(t, app, "users", "bob@x.com", nil),
	}
}
