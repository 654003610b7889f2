// The history of topics, as the engine uses it. The log itself is the package
// internal/history, which knows nothing of channels and audiences.

package notify

import (
	"context"
	"path/filepath"
	"time"

	"herald/notify/internal/history"
)

// Position is that of a message: all up to it have been seen. As text it is "EPOCH:SEQ".
type Position = history.Position

// ParsePosition reads "EPOCH:SEQ".
func ParsePosition(text string) (Position, error) { return history.ParsePosition(text) }

// Start is where in a topic's history to begin: after a position, or with the last messages.
// The zero value is the oldest message that is kept.
type Start = history.Start

// ParseStart reads the options "since" and "rewind" of a subscription or a request, of which
// one at least is empty: "EPOCH:SEQ"; "50" or "2m".
func ParseStart(since, rewind string) (Start, error) { return history.ParseStart(since, rewind) }

// sweepEvery is how often the log looks for messages that are not kept any more.
const sweepEvery = 2 * time.Second

func (n *Notifier) newHistory() *history.Log {
	path := n.config.HistoryPath
	if path == "" {
		path = filepath.Join(n.app.DataDir(), "notify_history.db")
	}
	return history.New(history.Config{
		Path:       path,
		Logger:     n.app.Logger,
		IDWindow:   n.config.IDWindow,
		SweepEvery: sweepEvery,
		Keep:       n.historyOf,
		Identify:   n.identify,
		Now:        time.Now,
		Guard:      n.guard,
	})
}

// OpenHistory opens the database of the history where there is one, so that a server tells
// at its start whether it can be read, and not at the first message.
func (n *Notifier) OpenHistory() error { return n.history.Open() }

// SnapshotHistory writes a copy of the history's database for a backup, beside
// it, while messages go on. It returns the paths of the database and of the copy,
// which the caller removes; the latter is empty where there is no history.
//
// Where the copy is found alone it is taken for the database, with another epoch:
// what was sent after it was made is not in it.
func (n *Notifier) SnapshotHistory(ctx context.Context) (path, snapshot string, err error) {
	return n.history.Snapshot(ctx)
}
