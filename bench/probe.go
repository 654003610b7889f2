//go:build unix

// A process of its own that sends 100 messages a second, and measures how long they take, while
// the load of another process keeps that one busy.

package main

import (
	"bufio"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"strconv"
	"time"
)

// probe is such a process, as the one that needs it sees it.
type probe struct {
	process *exec.Cmd
	input   io.WriteCloser
	output  *bufio.Reader
}

// startProbe starts one with n subscribers of topic.
func startProbe(w *world, topic string, n int) (*probe, error) {
	executable, err := os.Executable()
	if err != nil {
		return nil, err
	}
	p := &probe{process: exec.Command(executable, "probe", w.address, topic, strconv.Itoa(n))}
	p.process.Stderr = os.Stderr
	if p.input, err = p.process.StdinPipe(); err != nil {
		return nil, err
	}
	output, err := p.process.StdoutPipe()
	if err != nil {
		return nil, err
	}
	p.output = bufio.NewReader(output)
	if err := p.process.Start(); err != nil {
		return nil, err
	}
	_, err = p.output.ReadString('\n') // it has subscribed
	return p, err
}

// begin makes it send 100 messages a second.
func (p *probe) begin() error {
	_, err := fmt.Fprintln(p.input)
	return err
}

// end makes it stop, and returns the latencies in milliseconds.
func (p *probe) end() (p50, p99 float64, err error) {
	if _, err := fmt.Fprintln(p.input); err != nil {
		return 0, 0, err
	}
	_, err = fmt.Fscanln(p.output, &p50, &p99)
	return p50, p99, err
}

func (p *probe) stop() {
	p.process.Process.Kill()
	p.process.Wait()
}

// runProbe is the process.
func runProbe(address, topic, n string) error {
	w := &world{address: address, base: "http://" + address, reach: []string{address}, client: &http.Client{}}
	subscribers, err := strconv.Atoi(n)
	if err != nil {
		return err
	}
	if err := w.subscribe(subscribers, topic, true); err != nil {
		return err
	}
	fmt.Println()
	lines := make(chan struct{})
	go func() {
		defer close(lines)
		for input := bufio.NewScanner(os.Stdin); input.Scan(); {
			lines <- struct{}{}
		}
	}()
	<-lines
	sent := int64(0)
	for ticker := time.NewTicker(10 * time.Millisecond); ; {
		select {
		case <-ticker.C:
			if err := w.send(topic, 0); err != nil {
				return err
			}
			sent++
			continue
		case <-lines:
		}
		break
	}
	if err := w.await(sent*int64(subscribers), patience); err != nil {
		return err
	}
	w.leaving.Store(true)
	for _, closer := range w.closers {
		closer.Close()
	}
	w.readers.Wait()
	p50, p99 := percentiles(w.latencies)
	_, err = fmt.Println(p50, p99)
	return err
}
