package link

import (
	"reflect"
	"testing"
)

func TestMessage(t *testing.T) {
	for _, m := range []Message{
		{Name: "a", Wire: []byte("event:a\ndata:1\n\n"), To: []uint64{5}},
		{Name: "a?b", Private: true, Mark: Mark{"epoch", 1 << 40}, Wire: []byte("x"), To: []uint64{9, 3, 1 << 50, 4}},
		{Wire: []byte{}, To: []uint64{}},
	} {
		item := AppendMessage(nil, &m)
		var got Message
		if err := DecodeMessage(item, &got); err != nil {
			t.Fatal(err)
		}
		if len(m.To) == 0 {
			m.To, got.To = nil, nil
		}
		if !reflect.DeepEqual(got, m) {
			t.Errorf("got %+v, want %+v", got, m)
		}
		for size := range len(item) - 1 {
			if err := DecodeMessage(item[:size], &got); err == nil && size > 1 {
				t.Errorf("%d of %d bytes are accepted", size, len(item))
			}
		}
	}
}

func TestRaw(t *testing.T) {
	number, bytes, err := DecodeNumbered(EncodeNumbered(KindRaw, 1<<40, []byte("abc")))
	if err != nil || number != 1<<40 || string(bytes) != "abc" {
		t.Errorf("%d %q %v", number, bytes, err)
	}
	if _, _, err := DecodeNumbered([]byte{byte(KindRaw)}); err == nil {
		t.Error("a short item is accepted")
	}
}

func FuzzMessage(f *testing.F) {
	f.Add(AppendMessage(nil, &Message{Name: "a", Mark: Mark{"e", 1}, Wire: []byte("x"), To: []uint64{1, 2}}))
	f.Fuzz(func(t *testing.T, item []byte) {
		var m Message
		if DecodeMessage(item, &m) != nil {
			return
		}
		var again Message
		if err := DecodeMessage(AppendMessage(nil, &m), &again); err != nil {
			t.Fatal(err)
		}
	})
}
