//go:build unix

// A test of restarts: the server is killed again and again under thousands of clients, who all come back at
// once. Each of them must get every message of a topic with history exactly once. Behind edges nobody may notice: no
// client connects again, and those who watch who is present hear of nobody's absence.

package main

import (
	"bufio"
	"bytes"
	"encoding/json/v2"
	"errors"
	"fmt"
	"io"
	"log"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// survivors are the clients.
type survivors struct {
	world  *world
	tokens []string
	topics []string // beside the one with history
	epoch  string
	posts  chan struct{} // bounds the file descriptors

	head            atomic.Int64   // number of the last message
	reached         []atomic.Int64 // number of the last message that each client has
	missed, doubled atomic.Int64
	attempts        atomic.Int64 // failed ones
	connects        atomic.Int64
	isOver          atomic.Bool
}

func runRestarts(clients, times int, onEdges bool) error {
	kind := "herald"
	if onEdges {
		kind = "edges"
	}
	w, err := start(kind, false)
	if err != nil {
		return err
	}
	defer w.stop()
	s := &survivors{world: w, posts: make(chan struct{}, 2000), reached: make([]atomic.Int64, clients)}
	watching := &crowd{world: w, kind: "presence"}
	if onEdges {
		if err := errors.Join(w.get("/bench/room", new(bool)), watching.watch(8)); err != nil {
			return err
		}
		s.topics = []string{room}
	}
	var token, position string
	if err := errors.Join(
		w.get(fmt.Sprintf("/bench/tokens?n=%d", clients), &s.tokens),
		w.get("/bench/superuser", &token),
		w.get("/bench/miss?topic=members/1", &position),
	); err != nil {
		return err
	}
	epoch, number, _ := strings.Cut(position, ":")
	first, err := strconv.ParseInt(number, 10, 64)
	if err != nil {
		return err
	}
	s.epoch = epoch
	s.head.Store(first + 10)
	var group sync.WaitGroup
	for i := range clients {
		s.reached[i].Store(first)
		group.Go(func() { s.live(i) })
	}
	var publishing sync.Mutex
	publish := func() error {
		publishing.Lock()
		defer publishing.Unlock()
		id := fmt.Sprintf("message%d", s.head.Load()+1)
		for try := 0; ; try++ {
			err := w.postAs(token, "/api/notify", map[string]any{"topic": "members/1", "data": rawJSON("0"), "id": id})
			if err == nil {
				s.head.Add(1)
				return nil
			}
			if try == 500 {
				return err
			}
			time.Sleep(20 * time.Millisecond)
		}
	}
	awaitAll := func() error { // what has been sent by now
		head := s.head.Load()
		for began := time.Now(); ; time.Sleep(10 * time.Millisecond) {
			behind := 0
			for i := range s.reached {
				if s.reached[i].Load() < head {
					behind++
				}
			}
			if behind == 0 {
				return nil
			}
			if time.Since(began) > patience {
				return fmt.Errorf("%w: %d of %d clients are behind", errTimeout, behind, clients)
			}
		}
	}
	if err := awaitAll(); err != nil {
		return err
	}
	awaitOne := func() error { // the last message
		head := s.head.Load()
		for began := time.Now(); time.Since(began) < patience; time.Sleep(time.Millisecond) {
			for i := range s.reached {
				if s.reached[i].Load() >= head {
					return nil
				}
			}
		}
		return fmt.Errorf("%w: nobody gets anything", errTimeout)
	}
	pause := 200 * time.Millisecond
	if onEdges { // they need no requests, which would take the time
		pause = 10 * time.Millisecond
	}
	for i := range times {
		var sending sync.WaitGroup
		stop := make(chan struct{})
		var sendErr error
		sending.Go(func() { // also while the server is away
			for {
				select {
				case <-stop:
					return
				case <-time.After(pause):
				}
				if sendErr = publish(); sendErr != nil {
					return
				}
			}
		})
		time.Sleep(time.Second)
		if err := watching.begin(clients, i == 0); err != nil {
			return err
		}
		killed := time.Now()
		if err := w.restart(); err != nil {
			return err
		}
		began := time.Now()
		if err := publish(); err != nil {
			return err
		}
		if err := awaitOne(); err != nil {
			return err
		}
		flows := time.Since(killed)
		if err := awaitAll(); err != nil {
			return err
		}
		took := time.Since(began)
		close(stop)
		if sending.Wait(); sendErr != nil {
			return sendErr
		}
		if err := watching.awaitNothing(clients); err != nil {
			return err
		}
		heard := ""
		if onEdges {
			heard = fmt.Sprintf(", those who watch heard that all are there after %.1f s", time.Since(began).Seconds())
		}
		log.Printf("restart %d: messages flow again %.1f s after the kill, all %d are back and have everything after %.1f s%s, %d messages so far", i+1, flows.Seconds(), clients, took.Seconds(), heard, s.head.Load())
	}
	if err := awaitAll(); err != nil {
		return err
	}
	if onEdges { // somebody who is lost leaves after 10 s
		time.Sleep(12 * time.Second)
		if err := watching.begin(clients, false); err != nil {
			return err
		}
	}
	s.isOver.Store(true)
	for _, process := range append(w.edges, w.process) { // edges would keep their clients
		process.Process.Kill()
	}
	group.Wait()
	if connects := s.connects.Load(); onEdges && connects != int64(clients) {
		return fmt.Errorf("%d clients connected %d times", clients, connects)
	}
	fmt.Printf("%d clients over %d restarts: %d messages, %d missed, %d doubled, %d failed attempts to connect\n",
		clients, times, s.head.Load(), s.missed.Load(), s.doubled.Load(), s.attempts.Load())
	if s.missed.Load() > 0 || s.doubled.Load() > 0 {
		return errors.New("a message was not received exactly once")
	}
	fmt.Println("PASS")
	return nil
}

// begin waits until all watchers know that n are present, and forgets what they were told before for the first time.
func (c *crowd) begin(n int, isFirst bool) error {
	if err := c.awaitTotal(n); err != nil {
		return err
	}
	for i, r := range c.watchers {
		if err := r.check(i, n); err != nil && !isFirst {
			return err
		}
		r.frames.Store(0)
		r.leaves.Store(0)
		r.lowest.Store(int64(n))
	}
	return nil
}

// awaitNothing waits until all watchers have heard who is present, and returns an error if they have been told of
// less than n, or have lost their connection.
func (c *crowd) awaitNothing(n int) error {
	began := time.Now()
	for i, r := range c.watchers {
		for r.frames.Load() == 0 {
			select {
			case <-r.done:
				return fmt.Errorf("watcher %d has lost its connection", i)
			case <-time.After(10 * time.Millisecond):
			}
			if time.Since(began) > patience {
				return fmt.Errorf("%w: watcher %d hears nothing of who is present", errTimeout, i)
			}
		}
		if err := r.check(i, n); err != nil {
			return err
		}
	}
	return nil
}

func (r *watcher) check(i, n int) error {
	if lowest, leaves := r.lowest.Load(), r.leaves.Load(); lowest < int64(n) || leaves > 0 {
		return fmt.Errorf("watcher %d was told of %d leaves, and that %d of %d are present", i, leaves, lowest, n)
	}
	return nil
}

// live is one client: it connects again, as the SDK does, until the test is over.
func (s *survivors) live(i int) {
	for try := 0; !s.isOver.Load(); try++ {
		if s.connect(i) {
			try = 0
		} else {
			s.attempts.Add(1)
		}
		time.Sleep(pauseBefore(try))
	}
}

// connect is one connection of a client. It reports whether it was served.
func (s *survivors) connect(i int) (isServed bool) {
	body, closer, err := s.world.connect(false)
	if err != nil {
		return false
	}
	defer closer.Close()
	s.connects.Add(1)
	id, rest, err := clientID(body)
	if err != nil {
		return false
	}
	key := sinceKey("members/1", fmt.Sprintf("%s:%d", s.epoch, s.reached[i].Load()))
	s.posts <- struct{}{}
	err = s.world.postAs(s.tokens[i], "/api/realtime", map[string]any{"clientId": id, "subscriptions": append([]string{key}, s.topics...)})
	<-s.posts
	if err != nil {
		return false
	}
	lines := bufio.NewScanner(io.MultiReader(bytes.NewReader(rest), body))
	for lines.Scan() {
		data, isData := bytes.CutPrefix(lines.Bytes(), []byte("data:"))
		if !isData || !bytes.Contains(data, []byte(`"seq":`)) {
			continue
		}
		var message struct {
			Epoch string `json:"epoch"`
			Seq   int64  `json:"seq"`
			Gap   bool   `json:"gap"`
		}
		if err := json.Unmarshal(data, &message); err != nil {
			s.missed.Add(1)
			return true
		}
		switch last := s.reached[i].Load(); {
		case message.Epoch != s.epoch || message.Gap || message.Seq > last+1:
			s.missed.Add(1)
		case message.Seq <= last:
			s.doubled.Add(1)
		}
		s.reached[i].Store(message.Seq)
	}
	return true
}
