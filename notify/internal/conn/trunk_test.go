package conn

import (
	"bytes"
	"slices"
	"strings"
	"testing"
	"time"
)

// relayed is a connection on trunk.
func relayed(t *testing.T, group *Group, trunk *Trunk, number uint64) (*Conn, *noted) {
	t.Helper()
	owner := &noted{}
	c := group.Start(new(Conn), owner, "id")
	if !c.Relay(trunk, number, nil) {
		t.Fatal("it has ended")
	}
	t.Cleanup(func() {
		c.End(Left)
		<-c.Done()
	})
	return c, owner
}

func newTrunk(t *testing.T) (*Group, *Trunk) {
	t.Helper()
	group := NewGroup(Config{QueueSize: 10, QueueBytes: 4 << 20}, func(what string, cause any, _ string) {
		t.Errorf("panic while %s: %v", what, cause)
	})
	return group, group.NewTrunk(0, 0)
}

// deliver writes cargo to the connections, as text.
func deliver(cargo []Cargo, to map[uint64][]string) {
	for _, c := range cargo {
		for _, number := range c.To {
			to[number] = append(to[number], c.Frame.Name())
		}
		switch {
		case c.Ends != nil:
			to[c.Number] = append(to[c.Number], "end: "+c.Ends.Reason)
		case c.Retracts != nil:
			to[c.Number] = append(to[c.Number], strings.TrimSpace("retract "+strings.Join(slices.Collect(keys(c.Names)), " ")))
		}
	}
}

func keys(set map[string]struct{}) func(func(string) bool) {
	return func(yield func(string) bool) {
		for key := range set {
			if !yield(key) {
				return
			}
		}
	}
}

// await delivers what the trunk has until done.
func (t *Trunk) await(tt *testing.T, to map[uint64][]string, done func() bool) {
	tt.Helper()
	for deadline := time.After(30 * time.Second); !done(); {
		select {
		case <-t.Ready():
			deliver(t.Take(), to)
		case <-deadline:
			tt.Fatalf("got %v", to)
		}
	}
}

// TestTrunk: a message for many is carried once, and each connection's messages stay in order.
func TestTrunk(t *testing.T) {
	group, trunk := newTrunk(t)
	a, _ := relayed(t, group, trunk, 1)
	b, _ := relayed(t, group, trunk, 1<<40)
	first, second := NewFrame("first", []byte("1"), false), NewFrame("second", []byte("2"), false)
	a.Put(first)
	a.Put(second)
	b.Put(second)
	b.Put(first)
	got := map[uint64][]string{}
	trunk.await(t, got, func() bool { return len(got[1]) == 2 && len(got[1<<40]) == 2 })
	if !slices.Equal(got[1], []string{"first", "second"}) || !slices.Equal(got[1<<40], []string{"second", "first"}) {
		t.Errorf("got %v", got)
	}

	third := NewFrame("third", []byte("3"), false)
	var both []Cargo
	a.Put(third)
	b.Put(third)
	for count := 0; count < 2; {
		<-trunk.Ready()
		for _, c := range trunk.Take() {
			both = append(both, c)
			count += len(c.To)
		}
	}
	if len(both) > 2 || !bytes.Equal(both[0].Frame.Wire(), third.Wire()) {
		t.Errorf("carried %v", both)
	}
}

// TestRetract: what was carried for the former user is taken back before anything follows for the next one, also if
// that is carried for others already.
func TestRetract(t *testing.T) {
	group, trunk := newTrunk(t)
	a, _ := relayed(t, group, trunk, 1)
	b, _ := relayed(t, group, trunk, 2)
	shared := NewFrame("shared", []byte("1"), true)
	b.Put(shared)
	b.Flush()
	a.Put(NewFrame("secret", []byte("1"), true))
	a.Flush()
	a.EndIfPrivate(Left)
	a.Put(shared)
	a.Flush()
	a.Remove(map[string]struct{}{"shared": {}}, Failed)
	a.Finish(Lifetime)
	<-a.Done()
	got := map[uint64][]string{}
	trunk.await(t, got, func() bool { return slices.Contains(got[1], "end: "+Lifetime.Reason) })
	if want := []string{"secret", "retract", "shared", "retract shared", "end: " + Lifetime.Reason}; !slices.Equal(got[1], want) {
		t.Errorf("got %v", got[1])
	}
}

// TestFullTrunk: connections keep what the trunk does not take, until it does.
func TestFullTrunk(t *testing.T) {
	group, trunk := newTrunk(t)
	a, owner := relayed(t, group, trunk, 1)
	big := strings.Repeat("x", 300<<10)
	put := func(name string) { a.Put(NewFrame(name, []byte(`"`+big+`"`), false)) }
	for _, name := range []string{"1", "2", "3", "4", "5", "6", "7"} {
		put(name)
	}
	for deadline := time.Now().Add(10 * time.Second); trunk.Bytes() <= maxCargo; time.Sleep(time.Millisecond) { // its writer may not have begun
		if time.Now().After(deadline) {
			t.Fatal("it does not take what fits")
		}
	}
	if a.Queued() == 0 {
		t.Error("it took everything")
	}
	cut := make(chan struct{})
	close(cut)
	if err := trunk.NewLine(1, cut).Write([]byte("x")); err == nil {
		t.Error("it took more")
	}
	got := map[uint64][]string{}
	trunk.await(t, got, func() bool { return len(got[1]) == 7 })
	if !slices.Equal(got[1], []string{"1", "2", "3", "4", "5", "6", "7"}) {
		t.Errorf("got %v", got)
	}
	if err := trunk.NewLine(1, nil).Write([]byte("x")); err != nil {
		t.Error(err)
	}

	a.EndAt(TooSlow)
	<-a.Done()
	if owner.why != TooSlow {
		t.Errorf("ended with %v", owner.why)
	}
	for _, c := range trunk.Take() {
		if c.Ends != nil {
			t.Error("the other end is told what it knows")
		}
	}
	trunk.Close()
	if err := trunk.NewLine(1, nil).Write([]byte("x")); err == nil {
		t.Error("it takes more after its end")
	}
}

// TestShutdownIsNotCarried: connections of a server that stops go on at the other end.
func TestShutdownIsNotCarried(t *testing.T) {
	group, trunk := newTrunk(t)
	a, owner := relayed(t, group, trunk, 1)
	a.Put(NewFrame("last", []byte("1"), false))
	group.Shutdown(t.Context(), t.Context())
	got := map[uint64][]string{}
	deliver(trunk.Take(), got)
	if owner.why != Shutdown || !slices.Equal(got[1], []string{"last"}) {
		t.Errorf("ended with %v, carried %v", owner.why, got)
	}
}
