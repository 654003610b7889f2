// Positions in a topic's history, as clients have them. Read from the options of
// subscriptions and from requests, by access.go and recovery.go.

package notify

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/pocketbase/pocketbase/tools/subscriptions"
)

// Position is that of a message: all up to it have been seen. As text it is
// "EPOCH:SEQ".
type Position struct {
	// Epoch names the log that Seq belongs to. Numbers of another one tell nothing.
	Epoch string
	Seq   int64
}

func (p Position) String() string { return p.Epoch + ":" + strconv.FormatInt(p.Seq, 10) }

// ParsePosition reads "EPOCH:SEQ".
func ParsePosition(text string) (Position, error) {
	epoch, number, ok := strings.Cut(text, ":")
	seq, err := strconv.ParseInt(number, 10, 64)
	if !ok || err != nil || seq < 0 {
		return Position{}, fmt.Errorf("%q must be of the form EPOCH:SEQ", text)
	}
	return Position{epoch, seq}, nil
}

// start is where a replay is to begin: after a position, or with the last ones.
// The zero value is no replay.
type start struct {
	since  *Position
	count  int64
	lasted time.Duration
}

func (s start) isZero() bool { return s == start{} }

// parseStart reads the options "since" and "rewind" of a subscription.
func parseStart(options subscriptions.SubscriptionOptions) (start, error) {
	since, rewind := options.Query["since"], options.Query["rewind"]
	switch {
	case since != "" && rewind != "":
		return start{}, errors.New("since and rewind exclude each other")
	case since != "":
		position, err := ParsePosition(since)
		if err != nil {
			return start{}, fmt.Errorf("since: %w", err)
		}
		return start{since: &position}, nil
	case rewind != "":
		if count, err := strconv.ParseInt(rewind, 10, 64); err == nil && count >= 0 {
			return start{count: count}, nil
		}
		if d, err := time.ParseDuration(rewind); err == nil && d >= 0 {
			return start{lasted: d}, nil
		}
		return start{}, fmt.Errorf("rewind: %q must be a number of messages such as 50 or a duration such as 2m", rewind)
	}
	return start{}, nil
}
