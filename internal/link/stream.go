// Package link joins an origin and its edges over NATS. It knows no realtime connections.
//
// A [Stream] carries items in order and exactly once, in each direction, over messages that may be lost, doubled or
// reordered: stream.go sends, receive.go receives, packet.go is what travels. A handshake begins it and names the two
// sides (nats.go); items.go says what the items mean.
package link

import (
	"encoding/binary"
	"errors"
	"sync"
	"time"
)

// Config has the limits of a [Stream]. Zero fields stand for the defaults.
type Config struct {
	// MaxPacket is the maximum size of a packet in bytes. Defaults to 512 KiB, half of what NATS servers accept.
	MaxPacket int
	// Window is how many bytes may be on the way. They are kept until the other side has them, so that whatever is
	// lost can be sent again. Defaults to 8 MiB.
	Window int
	// Beat is how often a packet is sent when there is nothing to send. Defaults to a second.
	Beat time.Duration
	// Silence is the number of beats without any packet after which the other side counts as dead. Defaults to 10.
	Silence int
}

func (c Config) withDefaults() Config {
	if c.MaxPacket == 0 {
		c.MaxPacket = 512 << 10
	}
	if c.Window == 0 {
		c.Window = 8 << 20
	}
	if c.Beat == 0 {
		c.Beat = time.Second
	}
	if c.Silence == 0 {
		c.Silence = 10
	}
	return c
}

// The errors with which a stream ends.
var (
	ErrClosed = errors.New("the stream was closed")
	// ErrSilent means that nothing came from the other side any more.
	ErrSilent = errors.New("the other side is silent")
	// ErrDamaged means that what came is not a stream.
	ErrDamaged = errors.New("the other side sent something else than a stream")
	// ErrUnknown means that the other side knows nothing of the session.
	ErrUnknown = errors.New("the other side does not know the session")
)

const (
	// resendAfter is how long a packet may be without an acknowledgement before it is sent again, where the network is fast.
	resendAfter = 250 * time.Millisecond
	// ackAfter is how long an acknowledgement waits for something to travel with.
	ackAfter = 10 * time.Millisecond
	// ackBytes is how much may arrive before it is acknowledged at once.
	ackBytes = 512 << 10
	// maxEarly is how many packets are kept that came before an earlier one.
	maxEarly = 256
	// maxPatience limits how long it may be on a slow network.
	maxPatience = 5 * time.Second
	// maxItem is the maximum size of an item. The largest are requests with as much body as PocketBase accepts.
	maxItem = 64 << 20
)

// Stream is one side of a session. Its methods may be called concurrently.
type Stream struct {
	session uint64
	publish func(packet []byte) error
	receive func(item []byte) error
	ended   func(err error)
	config  Config
	kick    chan struct{} // wakes run
	done    chan struct{} // closed when run has returned

	mu       sync.Mutex    // guards the fields below
	err      error         // why it ended
	pending  []byte        // not in a packet yet
	sent     []packet      // not acknowledged, in order; some may not have been published yet
	size     int           // bytes of pending and sent
	next     uint64        // number of the next packet
	fresh    int           // how many at the end of sent have not been published
	moved    time.Time     // when something was acknowledged last, or first sent
	again    bool          // the other side has a hole
	isSlow   bool          // what was sent again had not been lost
	patience time.Duration // how long a packet may be without an acknowledgement before it is sent again
	caution  time.Duration // how long before the same hole is filled once more
	hasty    int           // packets that filled the same hole once more: if one comes twice, that is why
	hastyTo  uint64        // when the other side has this packet, it has these, too
	room     chan struct{}
	heard    bool   // since the last beat
	silent   int    // beats without a packet
	expect   uint64 // number of the packet that should come next
	ackDue   bool
	unacked  int // bytes that came since the last acknowledgement
	hole     bool
	double   bool

	receiving sync.Mutex // guards the fields below; mu is taken under it
	early     map[uint64][]byte
	partial   []byte // the beginning of an item
}

// NewStream begins one side of session. publish sends a packet to the other side and need not be reliable; it is
// called on one goroutine. receive is called for each item in order, by [Stream.Packet], and must not block or keep
// the item; an error ends the stream. ended is called once when the stream has ended, on a goroutine of its own.
func NewStream(session uint64, config Config, publish func([]byte) error, receive func([]byte) error, ended func(error)) *Stream {
	s := &Stream{
		session: session, publish: publish, receive: receive, ended: ended, config: config.withDefaults(),
		kick: make(chan struct{}, 1), done: make(chan struct{}), next: 1, expect: 1, patience: resendAfter, caution: ackAfter, early: map[uint64][]byte{},
	}
	go s.run()
	return s
}

// Write appends items, one after another without others in between. It waits while too much is on the way. The
// error says why the stream has ended.
func (s *Stream) Write(items ...[]byte) error {
	s.mu.Lock()
	for s.err == nil && s.size > s.config.Window {
		if s.room == nil {
			s.room = make(chan struct{})
		}
		room := s.room
		s.mu.Unlock()
		<-room
		s.mu.Lock()
	}
	defer s.mu.Unlock()
	if s.err != nil {
		return s.err
	}
	for _, item := range items {
		before := len(s.pending)
		s.pending = binary.AppendUvarint(s.pending, uint64(len(item)))
		s.pending = append(s.pending, item...)
		s.size += len(s.pending) - before
	}
	s.wake()
	return nil
}

// Close ends the stream at once, and waits until it publishes nothing more. What is on the way may be lost.
func (s *Stream) Close() {
	s.End()
	<-s.done
}

// End is Close without waiting.
func (s *Stream) End() { s.end(ErrClosed) }

// Drain waits until the other side has everything, for at most limit.
func (s *Stream) Drain(limit time.Duration) {
	for deadline := time.Now().Add(limit); time.Now().Before(deadline); time.Sleep(ackAfter) {
		s.mu.Lock()
		isDone := s.size == 0 || s.err != nil
		s.mu.Unlock()
		if isDone {
			return
		}
	}
}

// Err returns why the stream has ended, or nil.
func (s *Stream) Err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// Silent returns for how many beats nothing has come.
func (s *Stream) Silent() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.silent
}

// OnTheWay returns how many bytes the other side does not have yet.
func (s *Stream) OnTheWay() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.size
}

func (s *Stream) end(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.endLocked(err)
}

func (s *Stream) endLocked(err error) {
	if s.err != nil {
		return
	}
	s.err = err
	s.pending, s.sent, s.size, s.fresh = nil, nil, 0, 0
	s.tellRoom()
	s.wake()
	go s.ended(err)
}

// wake makes run look for what is to be done.
func (s *Stream) wake() {
	select {
	case s.kick <- struct{}{}:
	default:
	}
}

// tellRoom lets those write who wait. mu is held.
func (s *Stream) tellRoom() {
	if s.room != nil {
		close(s.room)
		s.room = nil
	}
}

// run publishes what is due, until the stream ends.
func (s *Stream) run() {
	defer close(s.done)
	beat := time.NewTicker(s.config.Beat)
	defer beat.Stop()
	timer := time.NewTimer(time.Hour) // for what is due before the next beat
	defer timer.Stop()
	for {
		isBeat := false
		select {
		case <-s.kick:
		case <-timer.C:
		case <-beat.C:
			isBeat = true
		}
		packets, wait, isOver := s.due(time.Now(), isBeat)
		if isOver {
			return
		}
		for _, p := range packets {
			_ = s.publish(p) // what does not arrive is sent again
		}
		timer.Reset(wait)
	}
}

// due returns the packets to publish now, and how long to wait for the next ones.
func (s *Stream) due(now time.Time, isBeat bool) (packets [][]byte, wait time.Duration, isOver bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if isBeat && s.err == nil {
		// Beats are counted instead of time: if this process was stopped for a while, it is the one that was silent.
		if s.silent++; s.heard {
			s.silent = 0
		}
		s.heard = false
		if s.silent > s.config.Silence {
			s.endLocked(ErrSilent)
		}
	}
	if s.err != nil {
		return nil, 0, true
	}
	s.cut(now)
	for i := len(s.sent) - s.fresh; i < len(s.sent); i++ {
		s.sent[i].at = now
		packets = append(packets, s.header(s.sent[i]))
	}
	if len(s.sent) > s.fresh { // only the first one is known to be missing
		first := &s.sent[0]
		isLate := now.Sub(s.moved) >= s.patience && now.Sub(first.at) >= s.patience
		if isLate {
			s.isSlow = false
			s.patience = min(2*s.patience, maxPatience) // it may be slow rather than lost
		}
		wait := ackAfter
		if first.again {
			wait = s.caution
		}
		if isLate || s.again && now.Sub(first.at) >= wait {
			if !isLate && first.again {
				s.hasty, s.hastyTo = s.hasty+1, s.next
			}
			first.at, first.again = now, true
			packets = append(packets, s.header(*first))
		}
	}
	s.fresh, s.again = 0, false
	if len(packets) == 0 && (s.unacked > 0 || s.ackDue || isBeat) {
		packets = append(packets, s.header(packet{}))
	}
	if len(packets) > 0 {
		s.ackDue, s.hole, s.double, s.unacked = false, false, false, 0
	}
	if len(s.sent) > 0 {
		return packets, s.patience, false
	}
	return packets, time.Hour, false
}

// cut makes packets of what is pending. mu is held.
func (s *Stream) cut(now time.Time) {
	room := s.config.MaxPacket - headerSize
	if len(s.sent) == 0 {
		s.moved, s.hasty, s.caution = now, 0, ackAfter
	}
	for len(s.pending) > 0 {
		part := s.pending[:min(len(s.pending), room):min(len(s.pending), room)]
		s.pending = s.pending[len(part):]
		s.sent = append(s.sent, packet{number: s.next, bytes: part})
		s.next++
		s.fresh++
	}
	s.pending = nil // its bytes belong to the packets now
}
