// Ending connections that must come back, some at a time.

package edge

import (
	"log/slog"
	"time"

	"herald/notify/internal/conn"
)

// The reasons for which an edge ends connections. See notify.Disconnect for the numbers.
var (
	disconnectResync = conn.Disconnect{Code: 5007, Reason: "messages were lost"}
	disconnectAlone  = conn.Disconnect{Code: 5008, Reason: "no origin"}
	disconnectDoubt  = conn.Disconnect{Code: 4004, Reason: "auth in doubt"}
)

// endRate is how many connections are ended per second when many must come back.
const endRate = 1000

// endSpread ends connections, some at a time.
func (e *Edge) endSpread(connections []*connection, why conn.Disconnect) {
	for i, c := range connections {
		time.AfterFunc(time.Duration(i)*time.Second/endRate, func() { c.conn.Finish(why) })
	}
}

// endIfAlone ends all connections if there has been no origin for too long.
func (e *Edge) endIfAlone() {
	e.mu.Lock()
	var all []*connection
	if len(e.connections) > 0 && time.Since(e.lost) > e.config.Patience {
		for _, c := range e.connections {
			if !c.isLeaving {
				c.isLeaving = true
				all = append(all, c)
			}
		}
	}
	e.mu.Unlock()
	if len(all) > 0 {
		e.config.Logger.Error("There is no origin: the connections are ended", slog.Int("connections", len(all)))
		e.endSpread(all, disconnectAlone)
	}
}
