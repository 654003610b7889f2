package link

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"herald/internal/seed"
)

// ends are two sides of a session, and a network between them that is bad at times.
type ends struct {
	a, b *Stream

	mu         sync.Mutex
	random     *rand.Rand
	bad        int // lose, double and delay so many of 100 packets each
	dead       bool
	gotA, gotB []uint64
	endedA     error
}

func newEnds(config Config, seed uint64, bad int) *ends {
	e := &ends{random: rand.New(rand.NewPCG(seed, 1)), bad: bad}
	number := func(got *[]uint64) func([]byte) error {
		return func(item []byte) error {
			e.mu.Lock()
			defer e.mu.Unlock()
			*got = append(*got, binary.BigEndian.Uint64(item))
			return nil
		}
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.a = NewStream(7, config, func(p []byte) error { return e.send(p, func() *Stream { return e.b }) }, number(&e.gotA), func(err error) {
		e.mu.Lock()
		defer e.mu.Unlock()
		e.endedA = err
	})
	e.b = NewStream(7, config, func(p []byte) error { return e.send(p, func() *Stream { return e.a }) }, number(&e.gotB), func(error) {})
	return e
}

// send brings a packet to the other side, or not.
func (e *ends) send(p []byte, to func() *Stream) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.dead || e.random.IntN(100) < e.bad {
		return errors.New("lost")
	}
	for range 1 + max(0, e.bad-e.random.IntN(100)) {
		delay := time.Duration(e.random.IntN(1000)) * time.Microsecond
		if e.random.IntN(100) < e.bad {
			delay *= 100
		}
		if e.bad == 0 {
			delay = time.Millisecond
		}
		packet, side := append([]byte(nil), p...), to()
		time.AfterFunc(delay, func() { side.Packet(packet) })
	}
	return nil
}

func (e *ends) close() {
	e.a.Close()
	e.b.Close()
	time.Sleep(time.Second) // packets on the way
}

// came returns what came at b, and how a ended.
func (e *ends) came() (items []uint64, endedA error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.gotB, e.endedA
}

func (e *ends) kill(isDead bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.dead = isDead
}

func item(number uint64, size int) []byte {
	return append(binary.BigEndian.AppendUint64(nil, number), make([]byte, size)...)
}

// TestStream sends items of all sizes both ways over networks that lose, double and reorder packets.
func TestStream(t *testing.T) {
	first := seed.Of(t) // not in a bubble, whose clock always begins at the same time
	for _, bad := range []int{0, 1, 10, 30} {
		t.Run(fmt.Sprint(bad), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				random := rand.New(rand.NewPCG(first, 2))
				e := newEnds(Config{MaxPacket: 1000, Window: 20_000}, first, bad)
				defer e.close()
				const count = 2000
				var writing sync.WaitGroup
				sizes := make([]int, 2*count)
				for i := range sizes {
					if sizes[i] = random.IntN(100); random.IntN(50) == 0 {
						sizes[i] = random.IntN(30_000)
					}
				}
				for side, stream := range []*Stream{e.a, e.b} {
					writing.Go(func() {
						for i := range count {
							if err := stream.Write(item(uint64(i), sizes[side*count+i])); err != nil {
								t.Error(err)
								return
							}
							if i%100 == 0 {
								time.Sleep(time.Millisecond)
							}
						}
					})
				}
				writing.Wait()
				e.a.Drain(time.Hour)
				e.b.Drain(time.Hour)
				e.mu.Lock()
				defer e.mu.Unlock()
				for name, got := range map[string][]uint64{"a": e.gotA, "b": e.gotB} {
					if len(got) != count {
						t.Fatalf("%s got %d items", name, len(got))
					}
					for i, number := range got {
						if number != uint64(i) {
							t.Fatalf("%s got %d at %d", name, number, i)
						}
					}
				}
			})
		})
	}
}

// TestWindow: nobody writes more than the window into a network that carries nothing, and all of it comes later.
func TestWindow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEnds(Config{MaxPacket: 1000, Window: 10_000, Silence: 1000}, 1, 0)
		defer e.close()
		e.kill(true)
		var written atomic.Int64
		done := make(chan struct{})
		go func() {
			defer close(done)
			for range 100 {
				if err := e.a.Write(item(0, 1000)); err != nil {
					t.Error(err)
				}
				written.Add(1)
			}
		}()
		time.Sleep(time.Minute)
		synctest.Wait()
		if size := e.a.OnTheWay(); size > 12_000 || written.Load() > 11 {
			t.Errorf("%d bytes, %d items", size, written.Load())
		}
		e.kill(false)
		<-done
		e.a.Drain(time.Minute)
		if got, _ := e.came(); len(got) != 100 {
			t.Errorf("%d came", len(got))
		}
	})
}

// TestSilence: a side that hears nothing ends, and lets those go who wait to write.
func TestSilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEnds(Config{Window: 100}, 1, 0)
		defer e.close()
		time.Sleep(time.Minute)
		if err := e.a.Err(); err != nil {
			t.Fatal(err)
		}
		e.kill(true)
		began := time.Now()
		var err error
		for err == nil {
			err = e.a.Write(item(1, 1000))
		}
		if lasted := time.Since(began); !errors.Is(err, ErrSilent) || lasted < 10*time.Second || lasted > 12*time.Second {
			t.Errorf("%v after %s", err, lasted)
		}
		synctest.Wait()
		if _, ended := e.came(); !errors.Is(ended, ErrSilent) {
			t.Errorf("ended with %v", ended)
		}
	})
}

// TestGarbage: packets of others are ignored, and a stream of garbage ends.
func TestGarbage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEnds(Config{}, 1, 0)
		defer e.close()
		for _, p := range [][]byte{nil, {1}, make([]byte, headerSize), make([]byte, 1000)} {
			e.b.Packet(p)
		}
		if err := e.a.Write(item(1, 0)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		if got, _ := e.came(); len(got) != 1 || e.b.Err() != nil {
			t.Errorf("got %v, error %v", got, e.b.Err())
		}
		garbage := binary.BigEndian.AppendUint64(nil, 7)
		garbage = binary.BigEndian.AppendUint64(garbage, 2)
		garbage = binary.BigEndian.AppendUint64(garbage, 1)
		garbage = append(garbage, 0)
		e.b.Packet(append(garbage, "\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"...))
		if err := e.b.Err(); !errors.Is(err, ErrDamaged) {
			t.Errorf("error %v", err)
		}
	})
}

// TestSlowNetwork: on a network that carries 1 MB per second, what is only slow is not sent again and again.
func TestSlowNetwork(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const rate, total = 1 << 20, 20 << 20
		var mu sync.Mutex // guards the variables below
		var a, b *Stream
		var free time.Time // when the network has carried what it has been given
		sent, came := 0, 0
		done := make(chan struct{})
		mu.Lock()
		a = NewStream(7, Config{}, func(p []byte) error {
			mu.Lock()
			defer mu.Unlock()
			if now := time.Now(); free.Before(now) {
				free = now
			}
			free = free.Add(time.Duration(len(p)) * time.Second / rate)
			sent += len(p)
			packet, to := append([]byte(nil), p...), b
			time.AfterFunc(time.Until(free), func() { to.Packet(packet) })
			return nil
		}, func([]byte) error { return nil }, func(error) {})
		b = NewStream(7, Config{}, func(p []byte) error {
			packet := append([]byte(nil), p...)
			time.AfterFunc(20*time.Millisecond, func() { a.Packet(packet) })
			return nil
		}, func(item []byte) error {
			mu.Lock()
			defer mu.Unlock()
			if came += len(item); came == total {
				close(done)
			}
			return nil
		}, func(error) {})
		mu.Unlock()
		began := time.Now()
		for range total / (64 << 10) {
			if err := a.Write(make([]byte, 64<<10)); err != nil {
				t.Fatal(err)
			}
		}
		<-done
		if took := time.Since(began); took > 2*total/rate*time.Second || sent > 2*total {
			t.Errorf("it took %s, and %d bytes", took, sent)
		}
		a.Close()
		b.Close()
		time.Sleep(time.Minute) // packets on the way
	})
}

// TestHaste: what was sent twice in haste explains only copies that come before what was sent later, also where there is
// always something on the way.
func TestHaste(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEnds(Config{MaxPacket: 1000}, 1, 0)
		defer e.close()
		write := func(count int) {
			for i := range count {
				if err := e.a.Write(item(uint64(i), 500)); err != nil {
					t.Error(err)
				}
				time.Sleep(100 * time.Microsecond)
			}
		}
		write(100)
		e.a.mu.Lock()
		if len(e.a.sent) == 0 {
			t.Error("nothing is on the way")
		}
		e.a.hasty, e.a.hastyTo = 3, e.a.next
		e.a.mu.Unlock()
		write(1000)
		e.a.mu.Lock()
		defer e.a.mu.Unlock()
		if e.a.hasty != 0 || len(e.a.sent) == 0 {
			t.Errorf("%d in haste, %d on the way", e.a.hasty, len(e.a.sent))
		}
	})
}
