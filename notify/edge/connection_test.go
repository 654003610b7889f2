package edge

import (
	"slices"
	"sync"
	"testing"
	"time"
)

// TestAwaitTurn: requests that wait until their connection is admitted again go on in the order in which they came.
func TestAwaitTurn(t *testing.T) {
	resuming := make(chan struct{})
	c := &connection{edge: &Edge{}, resuming: resuming}
	last := func() chan struct{} {
		c.edge.mu.Lock()
		defer c.edge.mu.Unlock()
		return c.last
	}
	const count = 50
	var went []int
	var waiting sync.WaitGroup
	for i := range count {
		before := last()
		waiting.Go(func() {
			sent := c.awaitTurn(t.Context().Done())
			went = append(went, i) // the race detector sees if another one is here, too
			sent()
		})
		for last() == before {
			time.Sleep(time.Microsecond)
		}
	}
	close(resuming)
	waiting.Wait()
	if len(went) != count || !slices.IsSorted(went) {
		t.Error(went)
	}

	c.awaitTurn(nil) // of one that is never on its way
	done := make(chan struct{})
	close(done)
	c.awaitTurn(done)() // another one does not wait for it forever
}
