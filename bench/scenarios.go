//go:build unix

// The scenarios that are measured.

package main

import (
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// scenario is one load, which yields some measures by name.
type scenario struct {
	label string
	n     int
	http2 bool
	// kinds are the two servers to compare; if empty, the snippet and Herald
	kinds [2]string
	run   func(w *world, n int) (map[string]float64, error)
}

func (s scenario) measure(kind string) (map[string]float64, error) {
	w, err := start(kind, s.http2)
	if err != nil {
		return nil, err
	}
	defer w.stop()
	return s.run(w, s.n)
}

func microseconds(to, from usage) float64 { return float64(to.CPU-from.CPU) / 1000 }

// deliveries is the number of deliveries to measure.
var deliveries = 200_000

const patience = 2 * time.Minute

// everybody sends to all of n subscribers. First it sends one message at a time, the next once all
// have the previous one, to measure CPU and latency. Then it sends as soon as the server answers,
// with at most 32 messages on their way, to measure throughput.
func everybody(w *world, n int) (map[string]float64, error) {
	before, err := w.usage(true)
	if err != nil {
		return nil, err
	}
	if err := w.subscribe(n, "bench", true); err != nil {
		return nil, err
	}
	if err := w.send("bench", 0); err != nil {
		return nil, err
	}
	if err := w.await(int64(n), patience); err != nil {
		return nil, err
	}
	subscribed, err := w.usage(false)
	if err != nil {
		return nil, err
	}
	connected, err := w.usage(true)
	if err != nil {
		return nil, err
	}

	messages := max(20, deliveries/n)
	total := w.received.Load()
	for range messages {
		if err := w.send("bench", 0); err != nil {
			return nil, err
		}
		total += int64(n)
		if err := w.await(total, patience); err != nil {
			return nil, err
		}
	}
	paced, err := w.usage(false)
	if err != nil {
		return nil, err
	}
	count := float64(messages * n)

	begin := time.Now()
	for i := range messages {
		if err := w.send("bench", 0); err != nil {
			return nil, err
		}
		if err := w.await(total+int64((i-31)*n), patience); err != nil {
			return nil, err
		}
	}
	if err := w.await(total+int64(messages*n), patience); err != nil {
		return nil, err
	}
	took := time.Since(begin)

	p50, p99 := w.percentiles(messages)
	return map[string]float64{
		"CPU µs per connection":     microseconds(subscribed, before) / float64(n),
		"CPU µs per delivery":       microseconds(paced, connected) / count,
		"deliveries per second":     count / took.Seconds(),
		"p50 ms":                    p50,
		"p99 ms":                    p99,
		"memory KiB per connection": float64(connected.RSS-before.RSS) / float64(n) / 1024,
	}, nil
}

// percentiles ends the subscribers and returns the latencies of the paced messages. Each sampled
// subscriber has count of them, after the first.
func (w *world) percentiles(count int) (p50, p99 float64) {
	w.leaving.Store(true)
	for _, closer := range w.closers {
		closer.Close()
	}
	w.readers.Wait()
	return percentiles(w.paced(count))
}

// percentiles returns two of latencies in milliseconds, and sorts these.
func percentiles(latencies []time.Duration) (p50, p99 float64) {
	slices.Sort(latencies)
	if len(latencies) == 0 {
		return 0, 0
	}
	at := func(p float64) float64 { return latencies[int(p*float64(len(latencies)-1))].Seconds() * 1000 }
	return at(0.5), at(0.99)
}

// paced returns the latencies without those of the throughput phase. Each sampled reader has
// appended 1 + count + count of them in one piece.
func (w *world) paced(count int) []time.Duration {
	var all []time.Duration
	for piece := range slices.Chunk(w.latencies, 1+2*count) {
		if len(piece) > count {
			all = append(all, piece[1:1+count]...)
		} else {
			all = append(all, piece...)
		}
	}
	return all
}

// oneAmong sends to one of n connections.
func oneAmong(w *world, n int) (map[string]float64, error) {
	if err := w.subscribe(n-1, "other", true); err != nil {
		return nil, err
	}
	if err := w.subscribe(1, "one", true); err != nil {
		return nil, err
	}
	const messages = 1000
	before, err := w.usage(true)
	if err != nil {
		return nil, err
	}
	for i := range messages {
		if err := w.send("one", 0); err != nil {
			return nil, err
		}
		if err := w.await(int64(i+1), patience); err != nil {
			return nil, err
		}
	}
	after, err := w.usage(false)
	if err != nil {
		return nil, err
	}
	p50, p99 := w.percentiles(messages - 1)
	return map[string]float64{"CPU µs per message": microseconds(after, before) / messages, "p50 ms": p50, "p99 ms": p99}, nil
}

// stalled sends to n subscribers, of which a tenth read nothing: 600 messages of 16 KiB, more than
// the kernel buffers for them.
func stalled(w *world, n int) (map[string]float64, error) {
	deaf := n / 10
	if err := w.subscribe(n-deaf, "bench", true); err != nil {
		return nil, err
	}
	if err := w.subscribe(deaf, "bench", false); err != nil {
		return nil, err
	}
	const messages = 600
	w.client.Timeout = 5 * time.Second // the snippet waits forever
	slowest := time.Duration(0)
	sent := 0
	for range messages {
		begin := time.Now()
		if err := w.send("bench", 16<<10); err != nil {
			break
		}
		sent++
		slowest = max(slowest, time.Since(begin))
		// at the pace of the reading subscribers
		if err := w.await(w.wanted(sent, n-deaf, 8), patience); err != nil {
			break
		}
	}
	err := w.await(int64(sent*(n-deaf)), 5*time.Second)
	if err != nil && !errors.Is(err, errTimeout) {
		return nil, err
	}
	return map[string]float64{
		"messages sent of 600":          float64(sent),
		"slowest send ms":               slowest.Seconds() * 1000,
		"healthy subscribers cut off":   float64(max(0, w.ended.Load())),
		"lost to healthy subscribers %": 100 * (1 - float64(w.received.Load())/float64(messages*(n-deaf))),
	}, nil
}

// wanted is the number of deliveries that must have arrived so that at most behind of the sent
// messages are on their way.
func (w *world) wanted(sent, n, behind int) int64 { return int64((sent - behind) * n) }

// burst sends 10,000 messages to n subscribers as fast as 8 publishers can.
func burst(w *world, n int) (map[string]float64, error) {
	if err := w.subscribe(n, "bench", true); err != nil {
		return nil, err
	}
	const messages, publishers = 10_000, 8
	before, err := w.usage(true)
	if err != nil {
		return nil, err
	}
	begin := time.Now()
	var failed atomic.Int64
	var group sync.WaitGroup
	for range publishers {
		group.Go(func() {
			for range messages / publishers {
				if w.send("bench", 0) != nil {
					failed.Add(1)
				}
			}
		})
	}
	group.Wait()
	err = w.await(int64(messages*n), 20*time.Second)
	if err != nil && !errors.Is(err, errTimeout) {
		return nil, err
	}
	took := time.Since(begin)
	after, err := w.usage(false)
	if err != nil {
		return nil, err
	}
	return map[string]float64{
		"seconds":             took.Seconds(),
		"lost %":              100 * (1 - float64(w.received.Load())/float64(messages*n)),
		"CPU µs per delivery": microseconds(after, before) / float64(w.received.Load()),
	}, nil
}

// beside sends to one subscriber of a topic, alone and while messages to n of another topic go out.
func beside(w *world, n int) (map[string]float64, error) {
	measures := map[string]float64{}
	measure := func(name string, load func() error) error {
		p, err := startProbe(w, "small", 1)
		if err != nil {
			return err
		}
		defer p.stop()
		if err := p.begin(); err != nil {
			return err
		}
		for began := time.Now(); time.Since(began) < 10*time.Second; {
			if err := load(); err != nil {
				return err
			}
		}
		p50, p99, err := p.end()
		measures["p50 ms "+name], measures["p99 ms "+name] = p50, p99
		return err
	}
	if err := measure("alone", func() error { time.Sleep(time.Second); return nil }); err != nil {
		return nil, err
	}
	if err := w.subscribe(n, "bench", true); err != nil {
		return nil, err
	}
	total := int64(0)
	err := measure("beside", func() error {
		if err := w.send("bench", 0); err != nil {
			return err
		}
		total += int64(n)
		if err := w.await(total, patience); err != nil {
			return err
		}
		time.Sleep(100 * time.Millisecond)
		return nil
	})
	return measures, err
}
