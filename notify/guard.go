// Panics. A panic in one of our goroutines costs what it was about, a connection or a message, but
// never the process, as in net/http for requests. The panic is logged.

package notify

import (
	"log/slog"
	"runtime/debug"
)

// guard logs a panic. Every goroutine must defer it. what describes the goroutine's work, for the
// log.
func (n *Notifier) guard(what string) {
	if cause := recover(); cause != nil {
		n.logPanic(what, cause)
	}
}

// guard ends the connection if a goroutine that works for it panics.
func (c *Client) guard(what string) {
	if cause := recover(); cause != nil {
		c.conn.End(DisconnectFailed)
		c.notifier.logPanic(what, cause, slog.String("clientId", c.Id()))
	}
}

func (n *Notifier) logPanic(what string, cause any, args ...any) {
	args = append(args, slog.Any("cause", cause), slog.String("stack", string(debug.Stack())))
	n.app.Logger().Error("Panic while "+what, args...)
}
