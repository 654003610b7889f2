//go:build unix

// A soak test: thousands of clients connect, stall, leave and return at random while messages are
// sent. No message may be lost to a client that reads, and nothing may be left on the server once
// all have gone.

package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// soak counts what the clients observe.
type soak struct {
	world *world
	until time.Time

	sent, finished                      atomic.Int64
	connects, received, stalls, refused atomic.Int64
	lost, cut                           atomic.Int64 // missing messages, and readers that the server disconnected
}

func runSoak(clients int, duration time.Duration) error {
	w, err := start("herald", false)
	if err != nil {
		return err
	}
	defer w.stop()
	// once, so that everything the server creates on first use exists
	if err := w.subscribe(10, "warm", true); err != nil {
		return err
	}
	if err := w.send("warm", 0); err != nil {
		return err
	}
	w.leaving.Store(true)
	for _, closer := range w.closers {
		closer.Close()
	}
	time.Sleep(time.Second)
	before, err := w.usage(true)
	if err != nil {
		return err
	}

	s := &soak{world: w, until: time.Now().Add(duration)}
	var group sync.WaitGroup
	for range clients {
		group.Go(func() {
			time.Sleep(rand.N(min(duration/4, 20*time.Second))) // clients do not all connect at once
			for time.Now().Before(s.until) {
				s.live()
			}
		})
	}
	group.Go(func() { s.publish() })
	group.Go(func() { s.report() })
	group.Wait()

	// the server takes a moment to notice closed connections
	var after usage
	for range 60 {
		time.Sleep(time.Second)
		if after, err = w.usage(true); err != nil {
			return err
		}
		if after.Goroutines <= before.Goroutines+5 && after.Files <= before.Files+5 {
			break
		}
	}
	fmt.Printf("%d clients for %v: %d connections, %d messages sent, %d received, %d lost, %d readers cut off, %d stalled\n",
		clients, duration, s.connects.Load(), s.sent.Load(), s.received.Load(), s.lost.Load(), s.cut.Load(), s.stalls.Load())
	fmt.Printf("server before: %s; after: %s\n", before, after)
	switch {
	case s.lost.Load() > 0 || s.cut.Load() > 0:
		return errors.New("messages were lost")
	case s.refused.Load() > 0:
		return fmt.Errorf("%d requests failed", s.refused.Load())
	case after.Goroutines > before.Goroutines+5 || after.Files > before.Files+5:
		return errors.New("goroutines or file descriptors are left over")
	case after.Heap > before.Heap+8<<20:
		return errors.New("memory is left over")
	}
	fmt.Println("PASS")
	return nil
}

// publish sends ten numbered messages per second, and some large ones for the stalling clients.
func (s *soak) publish() {
	ticker := time.NewTicker(100 * time.Millisecond)
	defer ticker.Stop()
	for time.Now().Before(s.until.Add(-2 * time.Second)) { // leave time for the last ones to arrive
		<-ticker.C
		seq := s.sent.Load() + 1
		err := s.world.post("/bench/send", map[string]any{"topic": "soak", "data": rawJSON(strconv.FormatInt(seq, 10))})
		if err == nil && seq%2 == 0 {
			err = s.world.send("bulk", 64<<10)
		}
		if err != nil {
			log.Print(err)
			s.refused.Add(1)
			continue
		}
		s.sent.Store(seq)
	}
	s.finished.Store(s.sent.Load())
}

func (s *soak) report() {
	for time.Now().Before(s.until) {
		time.Sleep(min(30*time.Second, time.Until(s.until)))
		log.Printf("%d connections so far, %d messages received, %d lost", s.connects.Load(), s.received.Load(), s.lost.Load())
	}
}

// live is one connection of a client. Of a hundred, two stall, eight leave at once, and the others
// read for a while.
func (s *soak) live() {
	kind := rand.IntN(100)
	topic, stay := "soak", 5*time.Second+rand.N(time.Minute)
	if kind < 2 {
		topic = "bulk"
	}
	body, closer, err := s.world.connect(kind < 2)
	if err != nil {
		log.Print(err)
		s.refused.Add(1)
		time.Sleep(time.Second)
		return
	}
	defer closer.Close()
	id, rest, err := clientID(body)
	if err == nil {
		err = s.world.post("/api/realtime", map[string]any{"clientId": id, "subscriptions": []string{topic}})
	}
	if err != nil {
		log.Print(err)
		s.refused.Add(1)
		time.Sleep(time.Second)
		return
	}
	s.connects.Add(1)
	leave := time.Now().Add(stay)
	if leave.After(s.until) {
		leave = s.until
	}
	switch {
	case kind < 2:
		s.stalls.Add(1)
		time.Sleep(time.Until(leave))
	case kind < 10:
		time.Sleep(rand.N(100 * time.Millisecond))
	default:
		s.read(body, closer, rest, leave)
	}
}

// read checks that no message is missing between the first and the last that the client gets.
func (s *soak) read(body io.Reader, closer io.Closer, rest []byte, leave time.Time) {
	var left atomic.Bool
	timer := time.AfterFunc(time.Until(leave), func() {
		left.Store(true)
		closer.Close()
	})
	defer timer.Stop()
	lines := bufio.NewScanner(io.MultiReader(bytes.NewReader(rest), body))
	last := int64(0)
	for lines.Scan() {
		data, ok := strings.CutPrefix(lines.Text(), "data:")
		if !ok {
			continue
		}
		seq, err := strconv.ParseInt(data, 10, 64)
		if err != nil {
			s.lost.Add(1)
			return
		}
		if last > 0 && seq != last+1 {
			s.lost.Add(1)
		}
		last = seq
		s.received.Add(1)
	}
	if !left.Load() {
		s.cut.Add(1)
		return
	}
	// a client that stayed to the end must have received the last message
	if finished := s.finished.Load(); finished > 0 && leave.Equal(s.until) && last > 0 && last != finished {
		s.lost.Add(finished - last)
	}
}
