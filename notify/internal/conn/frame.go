// A message as bytes on the wire: one SSE event. A sender creates it once per message and name, and
// all its recipients share it.

package conn

import (
	"bytes"
	"sync"
)

// Frame is a message that waits to be written. It never changes after creation.
type Frame struct {
	name string
	data []byte
	size int // of its bytes

	// The first writer encodes the bytes, not the sender: that may hold a lock, and one connection
	// may take the message under hundreds of names.
	encode  sync.Once
	encoded []byte

	// private means that the message must not be written once [Conn.EndIfPrivate] was called.
	private bool
	// comment means that the frame has no message and only keeps the connection alive.
	comment bool
	mark    Mark
	paged   bool
}

// Mark says where a message is kept, for a connection that is to go on after it in another process. It is zero if the
// message is not kept.
type Mark struct {
	Epoch string
	Seq   int64
}

// Marked sets the mark of f, which nobody else has yet, and returns f.
func (f *Frame) Marked(mark Mark) *Frame {
	f.mark = mark
	return f
}

// Paged says that f belongs to a page of earlier messages, which the client has not caused to come so fast. It returns
// f, which nobody else has yet.
func (f *Frame) Paged() *Frame {
	f.paged = true
	return f
}

// IsPaged reports what Paged has set.
func (f *Frame) IsPaged() bool { return f.paged }

// NewMarkFrame returns a frame without bytes, which only carries the mark of the messages under name.
func NewMarkFrame(name string, mark Mark) *Frame {
	return &Frame{name: name, encoded: []byte{}, mark: mark}
}

// Mark returns what Marked has set.
func (f *Frame) Mark() Mark { return f.mark }

// Name returns the name of the event.
func (f *Frame) Name() string { return f.name }

// Private reports whether the message is meant for one user: see [NewFrame].
func (f *Frame) Private() bool { return f.private }

// Wire returns the bytes of the event, which must not be changed.
func (f *Frame) Wire() []byte { return f.wire() }

// heartbeat is a comment line (WHATWG HTML, 9.2.5), which clients ignore. No empty line follows it,
// because some parsers take one for an event without data.
var heartbeat = &Frame{encoded: []byte(":\n"), size: 2, comment: true}

// NewFrame returns the event with name and data, which must not change any more. private says that
// it was meant for the one that the connection belongs to now: see [Conn.EndIfPrivate].
func NewFrame(name string, data []byte, private bool) *Frame {
	f := &Frame{name: name, data: data, private: private}
	if bytes.ContainsAny(data, "\r\n") {
		f.size = len(f.wire()) // with more than one data field
	} else {
		f.size = sizeOfSSE(name, data)
	}
	return f
}

// NewEncodedFrame is NewFrame for an event whose bytes are already known.
func NewEncodedFrame(name string, data, encoded []byte) *Frame {
	return &Frame{name: name, data: data, encoded: encoded, size: len(encoded)}
}

// NewCarriedFrame is NewFrame for an event whose bytes were carried here.
func NewCarriedFrame(name string, encoded []byte, private bool) *Frame {
	return &Frame{name: name, encoded: encoded, size: len(encoded), private: private}
}

// wire returns the bytes of f, which must not be changed.
func (f *Frame) wire() []byte {
	f.encode.Do(func() {
		if f.encoded == nil {
			f.encoded = EncodeSSE("", f.name, f.data)
		}
	})
	return f.encoded
}

// sizeOfSSE returns the length of EncodeSSE for data without line breaks.
func sizeOfSSE(name string, data []byte) int {
	size := len("event:\ndata:\n\n") + len(name) + len(data)
	for _, begin := range []bool{name != "" && name[0] == ' ', len(data) > 0 && data[0] == ' '} {
		if begin {
			size++
		}
	}
	return size
}

// EncodeSSE returns an SSE event in the form that PocketBase writes, with an id field unless id is
// empty.
//
// Unlike PocketBase's event, its content cannot break it. A line break in data starts another data
// field, and the client joins the fields by line breaks again. A value that begins with a space
// gets one more space before it, since the parser removes one (WHATWG HTML, 9.2.6). A name must
// have no line break.
func EncodeSSE(id, name string, data []byte) []byte {
	event := make([]byte, 0, len("id:\nevent: \ndata: \n\n")+len(id)+len(name)+len(data))
	if id != "" {
		event = appendField(event, "id:", id)
	}
	event = appendField(event, "event:", name)
	for bytes.ContainsAny(data, "\r\n") {
		var line []byte
		line, data = cutLine(data)
		event = appendField(event, "data:", line)
	}
	event = appendField(event, "data:", data)
	return append(event, '\n')
}

func appendField[T string | []byte](event []byte, name string, value T) []byte {
	event = append(event, name...)
	if len(value) > 0 && value[0] == ' ' {
		event = append(event, ' ')
	}
	event = append(event, value...)
	return append(event, '\n')
}

// cutLine cuts data after its first line, which ends at a CR, LF or CRLF.
func cutLine(data []byte) (line, rest []byte) {
	i := bytes.IndexAny(data, "\r\n")
	line, rest = data[:i], data[i+1:]
	if data[i] == '\r' && len(rest) > 0 && rest[0] == '\n' {
		rest = rest[1:]
	}
	return line, rest
}
