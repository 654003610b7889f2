// What an origin and its edges tell each other. Each item begins with its kind. Items about a connection name it by
// its number, which its edge has given it and never gives again.

package link

import (
	"encoding/binary"
	"encoding/json/jsontext"
	"encoding/json/v2"
	"errors"
	"fmt"
	"net/http"
	"time"
)

// Version is the version of the protocol. Both sides must have the same.
const Version = 4

// Kind is the kind of an item.
type Kind byte

// Items of an edge.
const (
	KindOpen    Kind = 'O' // an [Open]: a client connects, or is still there
	KindRequest Kind = 'R' // a [Request]: any other request about connections; the origin sends an [Answer]
	KindClosed  Kind = 'C' // an [End]: the connection has ended at the edge
	KindAll     Kind = 'L' // nothing else: all connections that are still there have been opened again
	KindRoom    Kind = 'V' // see [EncodeNumbered], without bytes: the answer to KindAsk
	KindFull    Kind = 'X' // as KindRoom: there has been no room for [FullAfter]
	KindReady   Kind = 'Y' // an [Expect], sent back: the edge knows of that request
)

// FullAfter is how long a client may leave no room in its queue before it counts as one that does not read.
const FullAfter = time.Second

// Items of an origin.
const (
	KindAnswer   Kind = 'A' // an [Answer]
	KindAccepted Kind = 'T' // an [Accepted]: what follows for the number is for its connection
	KindMessage  Kind = 'M' // a [Message] for any number of connections
	KindRaw      Kind = 'W' // bytes of one connection, see [EncodeNumbered]
	KindState    Kind = 'S' // a [State] that the edge keeps for a connection, to give it back when it resumes
	KindOwn      Kind = 'N' // an [Own], which adds to that
	KindBound    Kind = 'B' // a [Bound]: the connection cannot be resumed any more
	KindUser     Kind = 'U' // a [User]: the connection's client has become another one
	KindExpect   Kind = 'D' // an [Expect]: a request that comes by another way is about to change the connection
	KindHandled  Kind = 'H' // an [Expect]: that request has been handled
	KindForget   Kind = 'F' // a [Forget]: the connection has lost some of what it was subscribed to
	KindAsk      Kind = 'Q' // as KindRoom: the edge is to answer when the connection's queue has room for a page
	KindEnd      Kind = 'E' // an [End]: the edge must end the connection
	KindRetract  Kind = 'P' // a [Retract]: some of what waits at the edge must not be written
)

// HTTPRequest is a client's request.
type HTTPRequest struct {
	Method string      `json:"method"`
	URI    string      `json:"uri"`
	Host   string      `json:"host"`
	Remote string      `json:"remote"` // IP:PORT of the client, or of the proxy before the edge
	Header http.Header `json:"header"`
	Body   []byte      `json:"body,omitzero"`
}

// Open says that the connection Number has been requested or, with ID, that the client with that id is there and is
// to be admitted again.
type Open struct {
	Number  uint64      `json:"n"`
	Request HTTPRequest `json:"request"`
	ID      string      `json:"id,omitzero"`
	User    string      `json:"user,omitzero"`  // what it was told last
	State   *State      `json:"state,omitzero"` // what it was told last; nil if it had subscribed to nothing
}

// Request is a request that gets an answer.
type Request struct {
	Number  uint64      `json:"n"` // of the request; numbers of connections are different ones
	Request HTTPRequest `json:"request"`
	// Connection is the one of the edge that it is about; 0 if the edge knows of none.
	Connection uint64 `json:"c,omitzero"`
}

// Answer answers an [Open] that was refused or a [Request].
type Answer struct {
	Number uint64      `json:"n"`
	Status int         `json:"status"`
	Header http.Header `json:"header"`
	Body   []byte      `json:"body,omitzero"`
}

// Accepted answers an [Open].
type Accepted struct {
	Number uint64      `json:"n"`
	Status int         `json:"status"`
	Header http.Header `json:"header"`
	// ID is the client's id; with it the connection can be resumed. Otherwise its client must connect anew.
	ID string `json:"id,omitzero"`
}

// Mark is the position of a message in the history: see history.Position.
type Mark struct {
	Epoch string `json:"epoch"`
	Seq   int64  `json:"seq"`
}

// State is what a connection is subscribed to.
type State struct {
	Number uint64 `json:"n"`
	// Request is the request to subscribe that it comes from, without its body.
	Request HTTPRequest `json:"request"`
	Keys    []string    `json:"keys"`
	// Own are further keys, to which code of the application has subscribed it. The request makes it do that again.
	Own []string `json:"own,omitzero"`
	// Marks are the positions, by key, from which on messages of topics with history count. Those that the edge has
	// seen in messages are newer.
	Marks map[string]Mark `json:"marks,omitzero"`
	// Unstored says that some topics have no history: their messages cannot be had later.
	Unstored bool `json:"unstored,omitzero"`
}

// Own says that code of the application has subscribed a connection to Keys, along with those of its State.
type Own struct {
	Number   uint64          `json:"n"`
	Keys     []string        `json:"keys"`
	Marks    map[string]Mark `json:"marks,omitzero"` // as in State
	Unstored bool            `json:"unstored,omitzero"`
}

// User says who a connection's client is: a name that the origin gives, or "" for a guest.
type User struct {
	Number uint64 `json:"n"`
	User   string `json:"user"`
}

// Expect names a request that changes a connection and does not come through its edge. If the edge does not hear that it has
// been handled, it must not resume the connection: its client may have signed in or out.
type Expect struct {
	Number  uint64 `json:"n"`
	Request uint64 `json:"request"`
}

// Bound says that a connection cannot be resumed.
type Bound struct {
	Number uint64 `json:"n"`
}

// Forget says that a connection is no longer subscribed to Keys.
type Forget struct {
	Number uint64   `json:"n"`
	Keys   []string `json:"keys"`
}

// End says why a connection ends.
type End struct {
	Number      uint64 `json:"n"`
	Code        int    `json:"code"`
	Reason      string `json:"reason"`
	Undelivered int    `json:"undelivered,omitzero"`
	// Finish says that what was sent before is to be written first.
	Finish bool `json:"finish,omitzero"`
}

// Retract says what is not to be written any more: messages with Names or, if there are none, private ones. If some of these wait, the
// connection ends for the reason.
type Retract struct {
	Number uint64   `json:"n"`
	Names  []string `json:"names,omitzero"`
	Code   int      `json:"code,omitzero"`
	Reason string   `json:"reason,omitzero"`
}

// Encode returns an item of the kind.
func Encode(kind Kind, value any) ([]byte, error) {
	// headers and addresses may have any bytes
	encoded, err := json.Marshal(value, jsontext.AllowInvalidUTF8(true))
	if err != nil {
		return nil, fmt.Errorf("encode an item %c: %w", kind, err)
	}
	return append([]byte{byte(kind)}, encoded...), nil
}

// Decode reads what Encode wrote.
func Decode(item []byte, value any) error {
	if err := json.Unmarshal(item[1:], value, jsontext.AllowInvalidUTF8(true)); err != nil {
		return fmt.Errorf("decode an item %c: %w", item[0], err)
	}
	return nil
}

// KindOf returns the kind of an item, or 0 for an empty one.
func KindOf(item []byte) Kind {
	if len(item) == 0 {
		return 0
	}
	return Kind(item[0])
}

// EncodeNumbered returns an item of the kind about the connection with number, with bytes, which may be nil.
func EncodeNumbered(kind Kind, number uint64, bytes []byte) []byte {
	item := binary.AppendUvarint([]byte{byte(kind)}, number)
	return append(item, bytes...)
}

// DecodeNumbered reads what EncodeNumbered wrote.
func DecodeNumbered(item []byte) (number uint64, bytes []byte, err error) {
	number, n := binary.Uvarint(item[1:])
	if n <= 0 {
		return 0, nil, errShort
	}
	return number, item[1+n:], nil
}

// Message is an event for connections.
type Message struct {
	Name    string // the event's
	Mark    Mark   // zero if the message is not stored
	Private bool   // see conn.NewFrame
	Paged   bool   // see conn.Frame.Paged
	Wire    []byte // the event's bytes; none if only the mark counts
	To      []uint64
}

var errShort = errors.New("an item is too short")

// AppendMessage appends an item to buffer, which may be nil.
func AppendMessage(buffer []byte, m *Message) []byte {
	flags := byte(0)
	if m.Private {
		flags |= 1
	}
	if m.Mark != (Mark{}) {
		flags |= 2
	}
	if m.Paged {
		flags |= 4
	}
	buffer = append(buffer, byte(KindMessage), flags)
	buffer = appendText(buffer, m.Name)
	if m.Mark != (Mark{}) {
		buffer = appendText(buffer, m.Mark.Epoch)
		buffer = binary.AppendVarint(buffer, m.Mark.Seq)
	}
	buffer = appendText(buffer, m.Wire)
	buffer = binary.AppendUvarint(buffer, uint64(len(m.To)))
	before := uint64(0)
	for _, number := range m.To {
		buffer = binary.AppendVarint(buffer, int64(number-before))
		before = number
	}
	return buffer
}

func appendText[T string | []byte](buffer []byte, text T) []byte {
	buffer = binary.AppendUvarint(buffer, uint64(len(text)))
	return append(buffer, text...)
}

// DecodeMessage reads what AppendMessage wrote into m, whose To it reuses. Wire is a part of item.
func DecodeMessage(item []byte, m *Message) error {
	if len(item) < 2 {
		return errShort
	}
	r := reader{rest: item[2:]}
	m.Private, m.Paged, m.Mark = item[1]&1 != 0, item[1]&4 != 0, Mark{}
	m.Name = string(r.text())
	if item[1]&2 != 0 {
		m.Mark.Epoch = string(r.text())
		m.Mark.Seq = r.varint()
	}
	m.Wire = r.text()
	count := r.uvarint()
	m.To = m.To[:0]
	before := uint64(0)
	for ; count > 0 && !r.failed; count-- {
		before += uint64(r.varint())
		m.To = append(m.To, before)
	}
	if r.failed {
		return errShort
	}
	return nil
}

// reader reads the parts of an item.
type reader struct {
	rest   []byte
	failed bool
}

func (r *reader) uvarint() uint64 {
	value, n := binary.Uvarint(r.rest)
	return advance(r, value, n)
}

func (r *reader) varint() int64 {
	value, n := binary.Varint(r.rest)
	return advance(r, value, n)
}

func advance[T int64 | uint64](r *reader, value T, n int) T {
	if n <= 0 {
		r.failed = true
		return 0
	}
	r.rest = r.rest[n:]
	return value
}

func (r *reader) text() []byte {
	size := r.uvarint()
	if uint64(len(r.rest)) < size {
		r.failed = true
		return nil
	}
	text := r.rest[:size:size]
	r.rest = r.rest[size:]
	return text
}
