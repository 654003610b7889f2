package history

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// Position is the position of a message; every message up to it has been seen. As text it is
// "EPOCH:SEQ".
type Position struct {
	// Epoch names the log that Seq belongs to. Numbers of another epoch mean nothing.
	Epoch string
	Seq   int64
}

func (p Position) String() string { return p.Epoch + ":" + strconv.FormatInt(p.Seq, 10) }

// ParsePosition parses "EPOCH:SEQ".
func ParsePosition(text string) (Position, error) {
	epoch, number, ok := strings.Cut(text, ":")
	seq, err := strconv.ParseInt(number, 10, 64)
	if !ok || err != nil || seq < 0 {
		return Position{}, fmt.Errorf("%q must be of the form EPOCH:SEQ", text)
	}
	return Position{epoch, seq}, nil
}

// Start is where to begin in a topic's history: after a position, or with the last messages. The
// zero value begins at the oldest kept message.
type Start struct {
	Since *Position
	// Rewind asks for the last Count messages or, if Lasted is not 0, for those no older than
	// Lasted.
	Rewind bool
	Count  int64
	Lasted time.Duration

	end Position // count back from here instead of the topic's end, unless zero
}

// Before returns s for a rewind that counts back from end instead of the topic's end.
func (s Start) Before(end Position) Start {
	s.end = end
	return s
}

// ParseStart parses the options "since" ("EPOCH:SEQ") and "rewind" ("50" or "2m") of a subscription
// or a request. At least one must be empty.
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
