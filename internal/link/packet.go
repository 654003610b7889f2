// What travels: a part of a stream, with a header.

package link

import (
	"encoding/binary"
	"time"
)

// A packet begins with a header: the session, the number of the packet (0 if it has no bytes of the stream), the
// number of the packet that its sender expects next, and flags.
const (
	headerSize = 8 + 8 + 8 + 1
	flagHole   = 1 // a packet has come before the one that is expected
	flagReset  = 2 // the sender knows nothing of the session
	flagDouble = 4 // a packet has come twice
)

type packet struct {
	number uint64
	bytes  []byte
	at     time.Time // when it was published last
	again  bool      // more than once
}

// Session returns the session of a packet, or 0 if it is none.
func Session(p []byte) uint64 {
	if len(p) < headerSize {
		return 0
	}
	return binary.BigEndian.Uint64(p)
}

// Reset returns a packet that tells the other side that its session is not known to the process boot.
func Reset(session, boot uint64) []byte {
	p := make([]byte, headerSize)
	binary.BigEndian.PutUint64(p, session)
	binary.BigEndian.PutUint64(p[8:], boot)
	p[headerSize-1] = flagReset
	return p
}

// ResetBy returns the boot of the process that made p, if p is of [Reset].
func ResetBy(p []byte) (boot uint64, isReset bool) {
	if len(p) != headerSize || p[headerSize-1]&flagReset == 0 {
		return 0, false
	}
	return binary.BigEndian.Uint64(p[8:]), true
}

// header returns the packet as it is published. mu is held.
func (s *Stream) header(p packet) []byte {
	out := make([]byte, 0, headerSize+len(p.bytes))
	out = binary.BigEndian.AppendUint64(out, s.session)
	out = binary.BigEndian.AppendUint64(out, p.number)
	out = binary.BigEndian.AppendUint64(out, s.expect)
	flags := byte(0)
	if s.hole {
		flags = flagHole
	}
	if s.double {
		flags |= flagDouble
	}
	return append(append(out, flags), p.bytes...)
}
