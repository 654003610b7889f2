package conn

import "testing"

// The size by which a queue is bounded is the one of the bytes that are made later.
func TestFrameSize(t *testing.T) {
	for _, name := range []string{"", "t", " t", "chat/42?options=%7B%7D", "päth"} {
		for _, data := range []string{"", "1", " 1", `{"a":"ü"}`, "a\nb", "a\r\nb", "\n", " \n "} {
			f := NewFrame(name, []byte(data), false)
			if wire := f.wire(); f.size != len(wire) {
				t.Errorf("%q %q: size %d, %d bytes", name, data, f.size, len(wire))
			}
		}
	}
	if heartbeat.size != len(heartbeat.wire()) {
		t.Error("heartbeat")
	}
}
