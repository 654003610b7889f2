package history

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
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

// Start is where in a topic's history to begin: after a position, or with the last
// messages. The zero value is the oldest message that is kept.
type Start struct {
	Since *Position
	// Rewind: the last Count, or where Lasted is not 0 those that are no older.
	Rewind bool
	Count  int64
	Lasted time.Duration

	end Position // count from here, and not from the topic's end; the zero value: do not
}

// Before returns s for a rewind that counts from end, and not from the topic's end.
func (s Start) Before(end Position) Start {
	s.end = end
	return s
}

// ParseStart reads the options "since" and "rewind" of a subscription or a request,
// of which one at least is empty: "EPOCH:SEQ"; "50" or "2m".
func ParseStart(since, rewind string) (Start, error) {
	switch {
	case since != "" && rewind != "":
		return Start{}, errors.New("since and rewind exclude each other")
	case since != "":
		position, err := ParsePosition(since)
		if err != nil {
			return Start{}, fmt.Errorf("since: %w", err)
		}
		return Start{Since: &position}, nil
	case rewind != "":
		if count, err := strconv.ParseInt(rewind, 10, 64); err == nil && count >= 0 {
			return Start{Rewind: true, Count: count}, nil
		}
		if d, err := time.ParseDuration(rewind); err == nil && d >= 0 {
			return Start{Rewind: true, Lasted: d}, nil
		}
		return Start{}, fmt.Errorf("rewind: %q must be a number of messages such as 50 or a duration such as 2m", rewind)
	}
	return Start{}, nil
}
