// Arrivals: after a restart, all clients come back in the same moment. If all their requests ran at once, none
// would end for seconds, and messages to those already back would wait behind them. So only
// some run, and the others stand in line. What belongs to a connection that is already open goes first, so that those
// who were let in are served completely.

package hooks

import (
	"bytes"
	"container/list"
	"context"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/pocketbase/pocketbase/apis"
	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/hook"
	"github.com/pocketbase/pocketbase/tools/router"
)

const (
	// arrivalsPerCPU is how many requests run at once. Some wait for the database.
	arrivalsPerCPU = 4
	// arrivalTime is how long a request keeps its place. One that takes longer waits for something else than
	// the CPU, such as a handler of the application that asks another server.
	arrivalTime = 20 * time.Millisecond
	// arrivalPatience is how long a new connection waits in line before it is refused. PocketBase's
	// JavaScript SDK gives up after 15 seconds, and all work for it would be wasted.
	arrivalPatience = 8 * time.Second
	// arrivalSpread is the range of seconds from which refused clients are told to come back.
	arrivalSpread = 10
)

// arrivals lets the requests run with which clients come back: to connect, to subscribe and for missed
// messages.
type arrivals struct {
	places   int
	patience time.Duration

	mu      sync.Mutex // guards the fields below
	running int
	served  int       // places that have become free
	open    list.List // of channels that are closed when it is their turn: requests of open connections
	new     list.List // those that connect
	refused int       // since the log said so
	noted   time.Time // when that was
}

func newArrivals() *arrivals {
	return &arrivals{places: arrivalsPerCPU * runtime.GOMAXPROCS(0), patience: arrivalPatience}
}

// bindArrivals adds the middleware behind PocketBase's for CORS, so that browsers can read the refusal, and before
// the one that logs.
func bindArrivals(app core.App) {
	app.OnServe().Bind(&hook.Handler[*core.ServeEvent]{
		Id: "heraldArrivals",
		Func: func(e *core.ServeEvent) error {
			e.Router.Bind(newArrivals().middleware())
			return e.Next()
		},
	})
}

func (a *arrivals) middleware() *hook.Handler[*core.RequestEvent] {
	return &hook.Handler[*core.RequestEvent]{
		Id:       "heraldArrivals",
		Priority: apis.DefaultCorsMiddlewarePriority,
		Func: func(e *core.RequestEvent) error {
			isNew := false
			switch e.Request.URL.Path {
			case "/api/realtime":
				isNew = e.Request.Method != http.MethodPost
			case "/api/notify/history":
			default:
				return e.Next()
			}
			isNew = !readSmall(e.Request) || isNew
			leave, err := a.enter(e.Request.Context(), isNew)
			if err != nil {
				if e.Request.Context().Err() == nil {
					a.noteRefusal(e.App)
				}
				return refuse(e, 1+rand.IntN(arrivalSpread), http.StatusServiceUnavailable, "Too many clients are connecting.")
			}
			defer leave()
			e.Set(arrivalKey, leave)
			return e.Next()
		},
	}
}

// maxArrivalBody is how large the body of a request is that is read before the request stands in line.
const maxArrivalBody = 64 << 10

// readSmall reads the body of a request, so that the place of a request does not wait for it. It returns false, and reads nothing
// more, if the body may be large or does not come.
func readSmall(r *http.Request) bool {
	if r.ContentLength < 0 || r.ContentLength > maxArrivalBody {
		return false
	}
	if r.ContentLength == 0 {
		return true
	}
	body, err := io.ReadAll(r.Body)
	if err != nil {
		r.Body = io.NopCloser(io.MultiReader(bytes.NewReader(body), failingReader{err}))
		return false
	}
	r.Body = &router.RereadableReadCloser{ReadCloser: io.NopCloser(bytes.NewReader(body))}
	return true
}

// failingReader is the rest of a body that broke off.
type failingReader struct{ err error }

func (r failingReader) Read([]byte) (int, error) { return 0, r.err }

// noteRefusal logs refusals, once in a while: the log should not cost what refusing saves.
func (a *arrivals) noteRefusal(app core.App) {
	a.mu.Lock()
	a.refused++
	count := a.refused
	isTime := time.Since(a.noted) > arrivalPatience
	if isTime {
		a.refused, a.noted = 0, time.Now()
	}
	a.mu.Unlock()
	if isTime {
		app.Logger().Warn("Clients are told to connect again later: more arrive than the server can serve in time", slog.Int("refused", count))
	}
}

// arrivalKey is the key under which a request keeps the function that gives its place to the next one.
const arrivalKey = "heraldArrival"

// arrived gives the place of a request to the next one, since it has done its work.
func arrived(e *core.RequestEvent) {
	if leave, ok := e.Get(arrivalKey).(func()); ok {
		leave()
	}
}

// enter waits for a place. leave gives it to the next request; it may be called more than once. The error is
// that of ctx, or context.DeadlineExceeded if a new connection has waited too long.
func (a *arrivals) enter(ctx context.Context, isNew bool) (leave func(), err error) {
	a.mu.Lock()
	if a.running < a.places {
		a.running++
		a.mu.Unlock()
		return a.leaver(), nil
	}
	line := &a.open
	if isNew {
		line = &a.new
	}
	turn := make(chan struct{})
	place := line.PushBack(turn)
	a.mu.Unlock()

	var tooLong <-chan time.Time
	if isNew {
		timer := time.NewTimer(a.patience)
		defer timer.Stop()
		tooLong = timer.C
	}
	select {
	case <-turn:
		return a.leaver(), nil
	case <-tooLong:
		err = context.DeadlineExceeded
	case <-ctx.Done():
		err = ctx.Err()
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	select {
	case <-turn: // meanwhile
		return a.leaver(), nil
	default:
		line.Remove(place)
		return nil, err
	}
}

// leaver returns a function that ends the stay of a request, at most once, and ends it by itself after
// arrivalTime.
func (a *arrivals) leaver() func() {
	var once sync.Once
	leave := func() { once.Do(a.next) }
	timer := time.AfterFunc(arrivalTime, leave)
	return func() {
		timer.Stop()
		leave()
	}
}

// newEvery is how many places of which one goes to a new connection, also while there are requests of open
// ones: anybody can send as many of these as they like.
const newEvery = 4

// next gives a place that has become free to the first in line.
func (a *arrivals) next() {
	a.mu.Lock()
	defer a.mu.Unlock()
	lines := []*list.List{&a.open, &a.new}
	if a.served++; a.served%newEvery == 0 {
		slices.Reverse(lines)
	}
	for _, line := range lines {
		if first := line.Front(); first != nil {
			close(line.Remove(first).(chan struct{}))
			return
		}
	}
	a.running--
}
