package presence

import (
	"cmp"
	"encoding/json/jsontext"
	"fmt"
	"runtime"
	"strings"
	"testing"
)

// BenchmarkJoin is what it costs to come and go.
func BenchmarkJoin(b *testing.B) {
	rooms := New(Config[string]{Compare: strings.Compare, Due: func(string) {}, Grace: Grace})
	defer rooms.Stop()
	b.ReportAllocs()
	for b.Loop() {
		rooms.Join(topic, "ann", false, func() (About, Basis) { return About{}, 0 })
		rooms.Leave(topic, "ann", 0)
	}
}

// BenchmarkMemory is what a member of a large room costs, in bytes of the heap.
func BenchmarkMemory(b *testing.B) {
	type ref struct{ collection, id string }
	const count = 50_000
	about := func(id string) func() (About, Basis) {
		return func() (About, Basis) {
			return About{"users:" + id, jsontext.Value(`{"name":"` + id + `"}`)}, 1
		}
	}
	for b.Loop() {
		ids := make([]string, count)
		for i := range ids {
			ids[i] = fmt.Sprintf("user%011d", i)
		}
		rooms := New(Config[ref]{Compare: func(a, b ref) int { return cmp.Compare(a.id, b.id) }, Due: func(string) {}, Grace: Grace})
		before := heap()
		for _, id := range ids {
			rooms.Join(topic, ref{"_pb_users_auth_", id}, false, about(id))
		}
		rooms.Take(topic, Terms{Window: Window, Limit: count})
		rooms.State(topic, ref{}, 1)
		b.ReportMetric(float64(heap()-before)/count, "B/member")
		runtime.KeepAlive(ids)
		runtime.KeepAlive(rooms)
		rooms.Stop()
	}
}

func heap() int64 {
	runtime.GC()
	runtime.GC() // what pools hold lives through one
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}
