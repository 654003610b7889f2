// Panics. The policy: one in a goroutine of ours costs what that was about, a connection or
// a message, and never the process, as net/http has it for requests. It is in the log.

package notify

import (
	"log/slog"
	"runtime/debug"
)

// guard is to be deferred by every goroutine. what says what it does, for the log.
func (n *Notifier) guard(what string) {
	if cause := recover(); cause != nil {
		n.logPanic(what, cause)
	}
}

func (n *Notifier) logPanic(what string, cause any, args ...any) {
	args = append(args, slog.Any("cause", cause), slog.String("stack", string(debug.Stack())))
	n.app.Logger().Error("Panic while "+what, args...)
}
