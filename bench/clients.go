//go:build unix

// The load: subscribers that read with little effort, and a publisher.

package main

import (
	"bytes"
	"crypto/tls"
	"encoding/json/v2"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
)

// world is a server process with subscribers.
type world struct {
	process *exec.Cmd
	dir     string
	address string
	base    string // URL
	nats    string // of the edges
	edges   []*exec.Cmd
	reach   []string     // the addresses for realtime connections
	next    atomic.Int64 // counts connections
	http2   bool
	client  *http.Client
	token   string // token of the clients' user; empty if they are guests

	closersMu sync.Mutex
	closers   []io.Closer
	readers   sync.WaitGroup
	received  atomic.Int64
	ended     atomic.Int64 // connections that the server ended
	leaving   atomic.Bool
	latencyMu sync.Mutex
	latencies []time.Duration
}

func start(kind string, http2 bool) (*world, error) {
	address, err := freeAddress()
	if err != nil {
		return nil, err
	}
	w := &world{address: address, http2: http2}
	if w.dir, err = os.MkdirTemp("", "herald-bench-"); err != nil {
		return nil, err
	}
	executable, err := os.Executable()
	if err != nil {
		return nil, err
	}
	protocol, scheme := "http1", "http://"
	if http2 {
		protocol, scheme = "http2", "https://"
	}
	w.base = scheme + w.address
	w.reach = []string{address}
	w.client = &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 64, TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
	if w.nats, err = freeAddress(); err != nil {
		return nil, err
	}
	w.process = exec.Command(executable, "serve", kind, w.address, w.dir, protocol, w.nats)
	w.process.Stderr = os.Stderr
	if err := w.process.Start(); err != nil {
		return nil, err
	}
	if err := w.awaitStart(); err != nil {
		w.stop()
		return nil, err
	}
	if kind == "edges" {
		if err := w.startEdges(4); err != nil {
			w.stop()
			return nil, err
		}
	}
	w.token, err = w.userToken()
	return w, err
}

// freeAddress returns an address on which nothing listens.
func freeAddress() (string, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer listener.Close()
	return listener.Addr().String(), nil
}

func (w *world) awaitStart() error {
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		_, err := w.usage(false)
		if err == nil {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("the server did not start: %w", err)
		}
	}
}

func (w *world) stop() {
	w.leaving.Store(true)
	for _, closer := range w.closers {
		closer.Close()
	}
	for _, process := range append(w.edges, w.process) {
		process.Process.Kill()
		process.Wait()
	}
	w.readers.Wait()
	w.client.CloseIdleConnections()
	os.RemoveAll(w.dir)
}

func (w *world) usage(free bool) (usage, error) {
	path := "/bench/usage"
	if free {
		path += "?free"
	}
	var used usage
	response, err := w.client.Get(w.base + path)
	if err != nil {
		return used, err
	}
	defer response.Body.Close()
	return used, json.UnmarshalRead(response.Body, &used)
}

func (w *world) userToken() (string, error) {
	response, err := w.client.Get(w.base + "/bench/token")
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	token, err := io.ReadAll(response.Body)
	return string(token), err
}

func (w *world) post(path string, body any) error { return w.postAs(w.token, path, body) }

func (w *world) postAs(token, path string, body any) error {
	encoded, err := json.Marshal(body)
	if err != nil {
		return err
	}
	request, err := http.NewRequest(http.MethodPost, w.base+path, bytes.NewReader(encoded))
	if err != nil {
		return err
	}
	request.Header.Set("Content-Type", "application/json")
	request.Header.Set("Authorization", token)
	response, err := w.client.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	io.Copy(io.Discard, response.Body)
	if response.StatusCode != http.StatusNoContent && response.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", path, response.Status)
	}
	return nil
}

// text pads a message to about 100 bytes.
const text = "a line of a chat, as long as they are"

// send publishes one message on topic, with padding more bytes.
func (w *world) send(topic string, padding int) error {
	data := fmt.Sprintf(`{"t":%d,"text":"%s%s"}`, time.Now().UnixNano(), text, strings.Repeat("x", padding))
	return w.post("/bench/send", map[string]any{"topic": topic, "data": rawJSON(data)})
}

type rawJSON string

func (r rawJSON) MarshalJSON() ([]byte, error) { return []byte(r), nil }

// subscribe opens n connections that subscribe to topic; if reading is false, they stall.
func (w *world) subscribe(n int, topic string, reading bool) error {
	var group errgroup.Group
	group.SetLimit(32)
	for i := range n {
		group.Go(func() error {
			body, closer, err := w.connect(!reading)
			if err != nil {
				return err
			}
			id, rest, err := clientID(body)
			if err != nil {
				return err
			}
			err = w.post("/api/realtime", map[string]any{"clientId": id, "subscriptions": []string{topic}})
			if err != nil {
				return err
			}
			w.closeLater(closer)
			if reading {
				sampled := i%(n/100+1) == 0
				w.readers.Go(func() { w.read(body, rest, sampled) })
			}
			return nil
		})
	}
	return group.Wait()
}

// closeLater closes closer when the world ends.
func (w *world) closeLater(closer io.Closer) {
	w.closersMu.Lock()
	defer w.closersMu.Unlock()
	w.closers = append(w.closers, closer)
}

// connect opens one realtime connection. With small buffers it stalls early.
func (w *world) connect(small bool) (io.Reader, io.Closer, error) {
	if w.http2 {
		transport := &http.Transport{ForceAttemptHTTP2: true, TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}
		response, err := (&http.Client{Transport: transport}).Get(w.base + "/api/realtime")
		if err != nil {
			return nil, nil, err
		}
		if response.ProtoMajor != 2 {
			return nil, nil, errors.New("the server does not speak HTTP/2")
		}
		return response.Body, response.Body, nil
	}
	conn, err := net.Dial("tcp", w.reach[w.next.Add(1)%int64(len(w.reach))])
	if err != nil {
		return nil, nil, err
	}
	if small {
		conn.(*net.TCPConn).SetReadBuffer(4 << 10)
	}
	_, err = fmt.Fprintf(conn, "GET /api/realtime HTTP/1.1\r\nHost: %s\r\n\r\n", w.address)
	return conn, conn, err
}

// clientID reads up to the connect event.
func clientID(body io.Reader) (id string, rest []byte, err error) {
	var read []byte
	buffer := make([]byte, 4<<10)
	for {
		n, err := body.Read(buffer)
		if err != nil {
			return "", nil, err
		}
		read = append(read, buffer[:n]...)
		_, after, found := bytes.Cut(read, []byte(`{"clientId":"`))
		if id, rest, complete := bytes.Cut(after, []byte(`"}`)); found && complete {
			return string(id), bytes.Clone(rest), nil
		}
	}
}

// read counts the messages until the connection ends.
func (w *world) read(body io.Reader, pending []byte, sampled bool) {
	var latencies []time.Duration
	defer func() {
		w.latencyMu.Lock()
		defer w.latencyMu.Unlock()
		w.latencies = append(w.latencies, latencies...)
		if !w.leaving.Load() {
			w.ended.Add(1)
		}
	}()
	marker := []byte(`{"t":`)
	buffer := make([]byte, 4<<10)
	for {
		count := int64(0)
		for {
			at := bytes.Index(pending, marker)
			if at < 0 || len(pending) < at+len(marker)+19 {
				break // a time in nanoseconds has 19 digits
			}
			digits := pending[at+len(marker):][:19]
			if sampled {
				if sent, err := strconv.ParseInt(string(digits), 10, 64); err == nil {
					latencies = append(latencies, time.Duration(time.Now().UnixNano()-sent))
				}
			}
			count++
			pending = pending[at+len(marker)+19:]
		}
		if len(pending) > len(marker)+19 && !bytes.Contains(pending, marker) {
			pending = pending[len(pending)-len(marker):]
		}
		if count > 0 {
			w.received.Add(count)
		}
		n, err := body.Read(buffer)
		if err != nil {
			return
		}
		pending = append(append(make([]byte, 0, len(pending)+n), pending...), buffer[:n]...)
	}
}

var errTimeout = errors.New("not all messages arrived")

// await waits until count messages have been received.
func (w *world) await(count int64, timeout time.Duration) error {
	for deadline := time.Now().Add(timeout); w.received.Load() < count; time.Sleep(20 * time.Microsecond) {
		if time.Now().After(deadline) {
			return fmt.Errorf("%w: %d of %d, %d connections ended", errTimeout, w.received.Load(), count, w.ended.Load())
		}
	}
	return nil
}
