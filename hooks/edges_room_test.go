// How much may wait at an edge.

package hooks_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/pocketbase/pocketbase/core"

	"herald/internal/pbtest"
	"herald/notify"
	"herald/notify/edge"
)

// TestEdgeSmallQueue: the queue of an edge may be smaller than those of the origin: pages of the history, and what is
// written through handlers, fit into it.
func TestEdgeSmallQueue(t *testing.T) {
	t.Parallel() // it waits most of the time
	eachEdgeWay(t, func(t *testing.T, way way) {
		w := way.newWorld(t)
		addLog(t, w, 10_000)
		origin := pbtest.NewOrigin(t, w, pbtest.NATS(t, &server.Options{}))
		small := origin.EdgeWith(t, edge.Config{NATS: origin.NATS, Name: "small", QueueSize: 8, QueueBytes: 32 << 10})
		const count = 1700 // 7 MB: more than the sockets' buffers hold
		data := strings.Repeat("x", 4000)
		for range count {
			mustSend(t, w, "log/a", data)
		}
		for _, isLate := range []bool{false, true} {
			_, lines := openOn(t, small, nil, withQuery("log/a", "rewind", "10000"))
			if isLate {
				pbtest.WaitFor(t, "a page waits", func() bool { return small.EdgeStats().QueuedBytes > 0 })
			}
			(&numbered{lines: lines}).upTo(t, count)
		}
		if ends := engine(w).Stats().Disconnects; ends[notify.DisconnectQueueFull.Reason] > 0 {
			t.Errorf("disconnects: %v", ends)
		}
	})
}

// TestEdgeHandlerEnds: where a handler ends a connection, its client gets what handlers have written before.
func TestEdgeHandlerEnds(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.OnRealtimeMessageSend().BindFunc(func(e *core.RealtimeMessageEvent) error {
		err := e.Next()
		if err == nil && e.Message.Name == "last" {
			return errors.New("enough")
		}
		return err
	})
	server := pbtest.ServeEdge(t, w)
	const count = 30
	for range 20 {
		client := server.Subscribe(t, nil, "example", "last")
		for i := range count {
			mustSend(t, w, "example", i)
		}
		mustSend(t, w, "last", count)
		if events := client.ExpectEnd(t); len(events) != count+1 || events[count].Type != "last" {
			t.Fatalf("%d of %d came", len(events), count+1)
		}
	}
}

// TestEdgeResumesFullQueue: a client that comes back with the origin, and has much to read yet, gets what it missed when there is
// room for it.
func TestEdgeResumesFullQueue(t *testing.T) {
	t.Parallel() // it waits most of the time
	w := newWorld(t)
	addLog(t, w, 10_000)
	origin := pbtest.NewOrigin(t, w, pbtest.NATS(t, &server.Options{}))
	held := origin.Edge(t, "held")
	_, lines := openOn(t, held, nil, withQuery("log/a", "rewind", "1"))
	reader := &numbered{lines: lines}
	data := strings.Repeat("x", 50_000)
	sent := 0
	send := func() { mustSend(t, w, "log/a", data); sent++ }
	// the sockets' buffers are full, and the queue nearly; it reads a little, or it would be one that takes nothing for 10 seconds
	readSome := func() { reader.upTo(t, sent/10) }
	for held.EdgeStats().QueuedBytes <= 900<<10 {
		if sent == 1000 {
			t.Fatal("the client takes everything")
		}
		send()
		readSome()
		pbtest.WaitFor(t, "the edge has it", func() bool {
			edges := origin.Edges()
			return engine(w).Stats().QueuedBytes == 0 && len(edges) == 1 && edges[0].OnTheWay == 0
		})
	}
	origin.Close(0)
	for range 20 {
		send()
		readSome()
	}
	origin.Begin(t)
	origin.AwaitEdges(t, held)
	pbtest.WaitFor(t, "the client is back", func() bool { return len(engine(w).Topics()) > 0 })
	reader.upTo(t, sent)
}
