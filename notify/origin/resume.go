// A client that is admitted again after a restart: the request that it was subscribed by last is repeated.

package origin

import (
	"context"
	"encoding/json/v2"
	"net/http"
	"slices"
	"sync"

	"github.com/pocketbase/pocketbase/core"

	"herald/notify"
)

// awaitTurn waits until a client may be admitted again: all of an edge come at once.
func (x *Exchange) awaitTurn() bool {
	turns := x.session.origin.resuming
	select {
	case turns <- struct{}{}:
		x.release = sync.OnceFunc(func() { <-turns })
		return true
	case <-x.ctx.Done():
		return false
	}
}

// resubscribe subscribes a client that is back to what it had.
func (x *Exchange) resubscribe(client *notify.Client) {
	state := x.open.State
	request := state.Request
	var err error
	request.Body, err = json.Marshal(map[string]any{"clientId": client.Id(), "subscriptions": state.Keys})
	if err != nil {
		client.Close(notify.DisconnectFailed)
		return
	}
	request.Header = request.Header.Clone()
	if request.Header == nil {
		request.Header = http.Header{}
	}
	request.Header.Set("Content-Type", "application/json")
	w := &response{header: http.Header{}}
	x.session.origin.serve(w, newRequest(context.WithValue(x.ctx, resumeKey{}, x), &request))
	switch {
	case w.status >= http.StatusBadRequest:
		// it gets the refusal when it subscribes itself
		client.Close(notify.DisconnectEdge)
	case x.endIfOther(client):
	case !x.isBack() || client.Lacks(x.allowed(state.Keys)) || client.Lacks(state.Own):
		client.Close(notify.DisconnectEdge)
	case client.Misses(slices.Concat(state.Keys, state.Own), x.positions()):
		client.Finish(notify.DisconnectGap)
	}
}

// ResumesAs reports whether a request as auth, nil for a guest, may bring back a client that is admitted again, if ctx is of
// such a request. A guest may: code of the application may sign it in afterwards.
func ResumesAs(ctx context.Context, auth *core.Record) bool {
	x, ok := ctx.Value(resumeKey{}).(*Exchange)
	return !ok || auth == nil || notify.UserOf(auth) == x.open.User
}

// endIfOther ends a client that is back as somebody else than it was, and reports whether it was.
func (x *Exchange) endIfOther(client *notify.Client) bool {
	switch client.User() {
	case x.open.User:
		return false
	case "":
		client.Close(notify.DisconnectTokenExpired) // its SDK returns with its current token
	default:
		client.Close(notify.DisconnectEdge)
	}
	return true
}

type resumeKey struct{}

// Resumes returns the positions, by key, at which the client of a request to subscribe goes on, if it is one that is
// admitted again, and nil otherwise.
func Resumes(ctx context.Context) map[string]notify.Position {
	x, ok := ctx.Value(resumeKey{}).(*Exchange)
	if !ok {
		return nil
	}
	return x.positions()
}

// positions returns what the client has seen, by key.
func (x *Exchange) positions() map[string]notify.Position {
	positions := make(map[string]notify.Position, len(x.open.State.Marks))
	for key, mark := range x.open.State.Marks {
		positions[key] = notify.Position(mark)
	}
	return positions
}

func (x *Exchange) isBack() bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.back
}

// allowed returns those of keys that were not denied to the client when it came back.
func (x *Exchange) allowed(keys []string) []string {
	x.mu.Lock()
	defer x.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(keys), func(key string) bool { return slices.Contains(x.denied, key) })
}

// Line implements [notify.Carrier].
func (x *Exchange) Line() *notify.Line { return x.line }

// AwaitOthers implements [notify.Carrier].
func (x *Exchange) AwaitOthers() {
	if x.open.ID != "" {
		x.session.origin.awaitSettled(x.ctx)
	}
}
