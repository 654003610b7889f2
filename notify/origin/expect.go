// Requests that change a connection: its edge knows of each before it has an effect.

package origin

import (
	"context"
	"errors"
	"net/http"
	"time"

	"herald/internal/link"
	"herald/notify"
)

// expectPatience is how long a request waits for the edge that holds the client.
const expectPatience = 30 * time.Second

// way is how a request came that its edge knows to be about a connection.
type way struct {
	session *session
	number  uint64 // of the connection
}

type wayKey struct{}

type expectedKey struct{}

// Expect implements [notify.Carrier]. A request waits until the client is back as it was, if it is admitted again. The edge
// knows of a request that comes through it. It hears of others first: if it does not hear of their end, because the link
// or this process fails, it does not bring the client back as it was before.
func (x *Exchange) Expect(request *http.Request) (notify.Expected, error) {
	ctx := request.Context()
	expected := notify.Expected{Request: request, Handled: func() {}}
	if ctx.Value(expectedKey{}) == x || ctx.Value(resumeKey{}) == x {
		return expected, nil
	}
	expected.Request = request.WithContext(context.WithValue(ctx, expectedKey{}, x))
	deadline := time.Now().Add(expectPatience)
	await := func(happens <-chan struct{}) error {
		select {
		case <-happens:
			return nil
		default:
		}
		expected.Waited = true
		patience := time.NewTimer(time.Until(deadline))
		defer patience.Stop()
		select {
		case <-happens:
			return nil
		case <-x.done: // of the connection, or with all of the edge
		case <-ctx.Done():
		case <-patience.C:
		}
		return errEdgeSilent
	}
	if err := await(x.settled); err != nil {
		return expected, err
	}
	if ctx.Value(wayKey{}) == (way{x.session, x.number}) {
		return expected, nil
	}
	ready := make(chan struct{})
	x.mu.Lock()
	x.requests++
	expect := link.Expect{Number: x.number, Request: x.requests}
	x.expected[expect.Request] = ready
	x.control(link.KindExpect, expect)
	x.mu.Unlock()
	expected.Handled = func() {
		x.ready(expect.Request) // if the edge has not said so
		x.control(link.KindHandled, expect)
	}
	if err := await(ready); err != nil {
		expected.Handled()
		return expected, err
	}
	return expected, nil
}

var errEdgeSilent = errors.New("the edge does not answer")

// ready notes that the edge knows of a request.
func (x *Exchange) ready(request uint64) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if ready := x.expected[request]; ready != nil {
		close(ready)
		delete(x.expected, request)
	}
}
