package notify_test

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"

	"herald/notify"
)

func TestNormalizeJSON(t *testing.T) {
	for text, want := range map[string]string{
		`{"a":1,"b":2,"a":3}`:                      `{"b":2,"a":3}`,
		`{"a":1,"a":2,"a":3,"b":{}}`:               `{"a":3,"b":{}}`,
		`{"b":[],"a":{"x":1,"x":2},"a":{"y":1}}`:   `{"b":[],"a":{"y":1}}`,
		`[{"a":{"c":1,"c":"{"},"b":1.10}, 1e400 ]`: `[{"a":{"c":"{"},"b":1.10},1e400]`,
		`{"\ud83d":1,"\ud83e":2}`:                  "{\"\ufffd\":2}",
		`"\ud83d\ude00 \ud83d"`:                    "\"😀 \ufffd\"",
		"\"\xff\"":                                 "\"\ufffd\"",
		` null `:                                   `null`,
		`{}`:                                       `{}`,
		`{"a":1,"a"`:                               ``,
		`1 2`:                                      ``,
		``:                                         ``,
		`{"a":1}}`:                                 ``,
		`[1,]`:                                     ``,
		`{"a":[{"b":1,"c":2}],"a":[{"b":1,"b":2}]}`: `{"a":[{"b":2}]}`,
	} {
		got, err := notify.NormalizeJSON([]byte(text))
		if string(got) != want || (err == nil) != (want != "") {
			t.Errorf("%s: %s %v, want %s", text, got, err, want)
		}
	}
}

// FuzzNormalizeJSON: what it makes is JSON and means what encoding/json makes of it, to
// which the last of two names counts, too.
func FuzzNormalizeJSON(f *testing.F) {
	for _, seed := range []string{`{"a":1,"b":2,"a":3}`, `[{"a":{"c":1,"c":2}}]`, `"\ud83d"`, `1`} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		got, err := notify.NormalizeJSON(raw)
		if err != nil {
			return
		}
		if !got.IsValid() {
			t.Fatalf("%q became %q", raw, got)
		}
		decode := func(text []byte) (value any) {
			decoder := json.NewDecoder(bytes.NewReader(text))
			decoder.UseNumber()
			if err := decoder.Decode(&value); err != nil {
				return nil
			}
			return value
		}
		before, _ := json.Marshal(decode(raw))
		after, _ := json.Marshal(decode(got))
		if decode(raw) != nil && !bytes.Equal(before, after) {
			t.Errorf("%s became %s", before, after)
		}
	})
}

// BenchmarkNormalizeJSON compares a deep value with a flat one of the same size.
func BenchmarkNormalizeJSON(b *testing.B) {
	const size = 1 << 20
	text := strings.Repeat("x", size) + `\ud83d"`
	for name, raw := range map[string]string{
		"flat": `"` + text,
		"deep": strings.Repeat("[", 9000) + `"` + text + strings.Repeat("]", 9000),
	} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(size)
			for range b.N {
				if _, err := notify.NormalizeJSON([]byte(raw)); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
