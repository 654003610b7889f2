package hooks

import (
	"context"
	"encoding/json/v2"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pocketbase/pocketbase/apis"
	"github.com/pocketbase/pocketbase/core"

	"herald/internal/pbtest"
)

// inLine reports how many requests stand in line.
func (a *arrivals) inLine() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.open.Len() + a.new.Len()
}

// TestArrivalsInOrder: what belongs to an open connection goes before new ones, and else who came first.
func TestArrivalsInOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &arrivals{places: 1, patience: time.Minute}
		leave, err := a.enter(t.Context(), true)
		if err != nil {
			t.Fatal(err)
		}
		var mu sync.Mutex
		var order []string
		come := func(name string, isNew bool) {
			go func() {
				leave, err := a.enter(t.Context(), isNew)
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				order = append(order, name)
				mu.Unlock()
				leave()
				leave() // for nothing
			}()
			synctest.Wait()
		}
		come("new 1", true)
		come("new 2", true)
		come("open 1", false)
		come("open 2", false)
		leave()
		synctest.Wait()
		if want := []string{"open 1", "open 2", "new 1", "new 2"}; !slices.Equal(order, want) {
			t.Errorf("%v, want %v", order, want)
		}
		if a.running != 0 || a.inLine() != 0 {
			t.Errorf("%d run, %d wait", a.running, a.inLine())
		}
	})
}

// TestArrivalsEnd: a request that waits for something else than the CPU does not hold up the others, a new
// connection is refused when it has waited long, and one that leaves the line takes no place.
func TestArrivalsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &arrivals{places: 1, patience: arrivalTime / 2}
		began := time.Now()
		if _, err := a.enter(t.Context(), false); err != nil {
			t.Fatal(err)
		}
		if _, err := a.enter(t.Context(), true); !errors.Is(err, context.DeadlineExceeded) || time.Since(began) != a.patience {
			t.Errorf("after %s: %v", time.Since(began), err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		if _, err := a.enter(ctx, false); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
		if waiting := a.inLine(); waiting != 0 {
			t.Errorf("%d wait", waiting)
		}
		leave, err := a.enter(t.Context(), false)
		if err != nil || time.Since(began) != arrivalTime {
			t.Errorf("after %s: %v", time.Since(began), err)
		}
		leave()
		if time.Sleep(2 * arrivalTime); a.running != 0 {
			t.Errorf("%d run", a.running)
		}
	})
}

// TestArrivalsAtOnce: never more run than there are places, and all are served.
func TestArrivalsAtOnce(t *testing.T) {
	a := &arrivals{places: 3, patience: time.Minute}
	var running, most, served atomic.Int64
	var group sync.WaitGroup
	for i := range 500 {
		group.Go(func() {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			if i%10 == 0 {
				go cancel()
			}
			leave, err := a.enter(ctx, i%2 == 0)
			if err != nil {
				if i%10 != 0 {
					t.Error(err)
				}
				return
			}
			for now := running.Add(1); ; {
				if before := most.Load(); now <= before || most.CompareAndSwap(before, now) {
					break
				}
			}
			served.Add(1)
			running.Add(-1)
			leave()
		})
	}
	group.Wait()
	if most.Load() > 3 || served.Load() < 450 || a.running != 0 || a.inLine() != 0 {
		t.Errorf("%d at once, %d served, %d run, %d wait", most.Load(), served.Load(), a.running, a.inLine())
	}
}

// TestArrivalsRefused: a refused client is told when to come back, in PocketBase's form, and a browser of another
// origin can read it. What belongs to an open connection waits; other requests do not.
func TestArrivalsRefused(t *testing.T) {
	a := &arrivals{places: 1, running: 1, patience: 50 * time.Millisecond}
	app := pbtest.NewApp(t)
	app.OnServe().BindFunc(func(e *core.ServeEvent) error {
		e.Router.Bind(apis.CORS(apis.CORSConfig{AllowOrigins: []string{"*"}})) // as apis.Serve does
		e.Router.Bind(a.middleware())
		return e.Next()
	})
	server := pbtest.Serve(t, app)
	for range 3 {
		request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, server.URL+"/api/realtime", nil)
		if err != nil {
			t.Fatal(err)
		}
		request.Header.Set("Origin", "https://example.com")
		response, err := http.DefaultClient.Do(request)
		if err != nil {
			t.Fatal(err)
		}
		var body struct {
			Status  int
			Message string
		}
		if err := json.UnmarshalRead(response.Body, &body, json.MatchCaseInsensitiveNames(true)); err != nil {
			t.Fatal(err)
		}
		response.Body.Close()
		after, err := strconv.Atoi(response.Header.Get("Retry-After"))
		if response.StatusCode != 503 || body.Status != 503 || body.Message == "" || err != nil || after < 1 || after > arrivalSpread {
			t.Errorf("%s %+v, Retry-After %q", response.Status, body, response.Header.Get("Retry-After"))
		}
		if response.Header.Get("Access-Control-Allow-Origin") == "" {
			t.Error("a browser cannot read the refusal")
		}
	}
	if status, _ := server.Do(t, http.MethodGet, "/api/health", "", nil); status != 200 {
		t.Errorf("another request: %d", status)
	}
	answered := make(chan int)
	go func() {
		status, _ := server.Do(t, http.MethodPost, "/api/realtime", "", map[string]any{"clientId": "missing"})
		answered <- status
	}()
	pbtest.WaitFor(t, "the request stands in line", func() bool { return a.inLine() == 1 })
	a.next()
	if status := <-answered; status != 404 {
		t.Errorf("%d, want PocketBase's answer", status)
	}
}

// TestArrivalsOfMany: however many requests of open connections come, new ones have their turn, and a body that does
// not come holds no place.
func TestArrivalsOfMany(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &arrivals{places: 1, running: 1, patience: time.Minute}
		var order []bool
		for i := range 50 {
			go func() {
				isNew := i >= 40
				leave, err := a.enter(t.Context(), isNew)
				if err != nil {
					t.Error(err)
					return
				}
				order = append(order, isNew)
				leave()
			}()
			synctest.Wait()
		}
		a.next()
		synctest.Wait()
		if first := slices.Index(order, true); len(order) != 50 || first >= newEvery {
			t.Errorf("%d served, the first new one at %d", len(order), first)
		}
	})

	a := &arrivals{places: 1, patience: time.Minute}
	app := pbtest.NewApp(t)
	app.OnServe().BindFunc(func(e *core.ServeEvent) error {
		e.Router.Bind(a.middleware())
		return e.Next()
	})
	server := pbtest.Serve(t, app)
	conn, err := net.Dial("tcp", server.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(conn, "POST /api/realtime HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{")
	if status, _ := server.Do(t, http.MethodPost, "/api/realtime", "", map[string]any{"clientId": "missing"}); status != 404 {
		t.Errorf("%d, want PocketBase's answer", status)
	}
	a.mu.Lock()
	if a.running != 0 {
		t.Errorf("%d run", a.running)
	}
	a.mu.Unlock()
	conn.Close() // a body that breaks off
	large := map[string]any{"clientId": strings.Repeat("x", maxArrivalBody)}
	if status, _ := server.Do(t, http.MethodPost, "/api/realtime", "", large); status != 400 {
		t.Errorf("a large body: %d", status)
	}
}
