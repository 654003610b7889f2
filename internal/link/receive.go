// The receiving half of a stream: packets are put in order, and the items that are complete handed over.

package link

import (
	"encoding/binary"
	"time"
)

// Packet takes a packet that has come. It calls receive for each item that is complete with it.
func (s *Stream) Packet(p []byte) {
	if len(p) < headerSize || Session(p) != s.session {
		return
	}
	if p[headerSize-1]&flagReset != 0 {
		s.end(ErrUnknown)
		return
	}
	number, expected := binary.BigEndian.Uint64(p[8:]), binary.BigEndian.Uint64(p[16:])
	s.acknowledged(expected, p[headerSize-1])
	if number == 0 {
		return
	}

	s.receiving.Lock()
	defer s.receiving.Unlock()
	next := s.expected()
	switch {
	case number < next: // doubled
	case number > next:
		if len(s.early) < maxEarly {
			s.early[number] = append([]byte(nil), p[headerSize:]...)
		}
	default:
		s.take(p[headerSize:])
		for next++; ; next++ {
			bytes, ok := s.early[next]
			if !ok {
				break
			}
			delete(s.early, next)
			s.take(bytes)
		}
	}
	s.came(next, len(p), number)
}

// acknowledged notes that the other side has all packets before expected.
func (s *Stream) acknowledged(expected uint64, flags byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.heard = true
	s.silent = 0
	switch {
	case flags&flagDouble == 0:
	case s.hasty > 0:
		s.hasty--
		s.caution = min(2*s.caution, maxPatience)
	default:
		s.isSlow = true
	}
	if expected > s.hastyTo {
		s.hasty = 0
	}
	count := 0
	for count < len(s.sent)-s.fresh && s.sent[count].number < expected {
		s.size -= len(s.sent[count].bytes)
		count++
	}
	if count > 0 {
		if last := s.sent[count-1]; !last.again { // then it is known how long the way takes
			s.patience = min(max(resendAfter, 2*time.Since(last.at)), maxPatience)
		} else if len(s.sent) > count+s.fresh && !s.isSlow { // what was lost with it is needed next
			s.again = true
			s.wake()
		}
		clear(s.sent[:count])
		s.sent = s.sent[count:]
		s.moved = time.Now()
	}
	if s.size <= s.config.Window {
		s.tellRoom()
	}
	if flags&flagHole != 0 && len(s.sent) > s.fresh && s.sent[0].number == expected {
		s.again = true
		s.wake()
	}
}

func (s *Stream) expected() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.expect
}

// came notes that the packet next is expected, after number has come.
func (s *Stream) came(next uint64, size int, number uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	isHole := number > next
	isDouble := number < s.expect && next == s.expect
	s.expect = next
	s.unacked += size
	s.hole = s.hole || isHole
	s.double = s.double || isDouble
	switch {
	case isHole, isDouble, s.unacked >= ackBytes:
		s.ackDue = true
		s.wake()
	case !s.ackDue:
		s.ackDue = true
		time.AfterFunc(ackAfter, s.wake)
	}
}

// take appends bytes of the stream, and hands over the items that are complete. receiving is held.
func (s *Stream) take(bytes []byte) {
	isPartial := len(s.partial) > 0
	if isPartial {
		s.partial = append(s.partial, bytes...)
		bytes = s.partial
	}
	before := len(bytes)
	for s.Err() == nil {
		size, n := binary.Uvarint(bytes)
		if n < 0 || size > maxItem {
			s.end(ErrDamaged)
			return
		}
		if n == 0 || uint64(len(bytes)-n) < size {
			break
		}
		if err := s.receive(bytes[n : n+int(size)]); err != nil {
			s.end(err)
			return
		}
		bytes = bytes[n+int(size):]
	}
	if !isPartial || len(bytes) < before { // otherwise nothing was complete, and a large item need not be copied again and again
		s.partial = append([]byte(nil), bytes...)
	}
}
