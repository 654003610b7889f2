// The history of topics as the engine uses it. The log itself is the package internal/history,
// which knows nothing about channels and audiences.

package notify

import (
	"context"
	"path/filepath"
	"time"

	"herald/notify/internal/history"
)

// Position is the position of a message; every message up to it has been seen. As text it is
// "EPOCH:SEQ".
type Position = history.Position

// ParsePosition parses "EPOCH:SEQ".
func ParsePosition(text string) (Position, error) { return history.ParsePosition(text) }

// Start is where to begin in a topic's history: after a position, or with the last messages. The
// zero value begins at the oldest kept message.
type Start = history.Start

// ParseStart parses the options "since" ("EPOCH:SEQ") and "rewind" ("50" or "2m") of a subscription
// or a request. At least one must be empty.
func ParseStart(since, rewind string) (Start, error) { return history.ParseStart(since, rewind) }

// sweepEvery is how often the log looks for messages that are no longer kept.
const sweepEvery = 2 * time.Second

func (n *Notifier) newHistory() *history.Log {
	path := n.config.HistoryPath
	if path == "" {
		path = filepath.Join(n.app.DataDir(), "notify_history.db")
	}
	start := time.Now()
	return history.New(history.Config{
		Path:       path,
		Logger:     n.app.Logger,
		IDWindow:   n.config.IDWindow,
		SweepEvery: sweepEvery,
		Keep:       n.historyOf,
		Identify:   n.identify,
		Now:        time.Now,
		Elapsed:    func(now time.Time) time.Duration { return now.Sub(start) },
		Guard:      n.guard,
	})
}

// OpenHistory opens the database of the history if it exists, so that a server finds out at
// startup, not at the first message, whether it can be read.
func (n *Notifier) OpenHistory() error { return n.history.Open() }

// SnapshotHistory writes a copy of the history's database for a backup, beside the database, while
// messages continue. It returns the paths of the database and of the copy, which the caller
// removes. The copy's path is empty if there is no history.
//
// If the copy is found alone, it becomes the database, with another epoch, because it lacks what
// was sent after it was made.
func (n *Notifier) SnapshotHistory(ctx context.Context) (path, snapshot string, err error) {
	return n.history.Snapshot(ctx)
}
