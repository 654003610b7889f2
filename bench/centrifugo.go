//go:build unix

// The same requests to Centrifugo, for the figures in the README. It is another executable:
//
//	go install github.com/centrifugal/centrifugo/v6@latest
//	bin/bench -centrifugo $(go env GOPATH)/bin/centrifugo

package main

import (
	"bytes"
	"encoding/json/v2"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/pocketbase/pocketbase/tools/security"
)

const centrifugoSecret = "a secret that everybody knows"

// centrifugo is a server whose clients use its unidirectional SSE, which is what an EventSource can use.
type centrifugo struct{ *world }

func startCentrifugo(path string) (*centrifugo, error) {
	dir, err := os.MkdirTemp("", "herald-bench-")
	if err != nil {
		return nil, err
	}
	address, err := freeAddress()
	if err != nil {
		return nil, err
	}
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	type object = map[string]any
	config, err := json.Marshal(object{
		"http_server": object{"address": host, "port": port},
		"log":         object{"level": "error"},
		"http_api":    object{"key": centrifugoSecret},
		"uni_sse":     object{"enabled": true},
		"client": object{
			"token":                                 object{"hmac_secret_key": centrifugoSecret},
			"allow_anonymous_connect_without_token": true,
		},
		"channel": object{"without_namespace": object{"allow_subscribe_for_client": true, "allow_subscribe_for_anonymous": true},
			"namespaces": []object{{
				"name": "kept", "allow_subscribe_for_client": true, "allow_subscribe_for_anonymous": true,
				"history_size": 1000, "history_ttl": "1h", "force_recovery": true,
			}},
		},
	})
	if err != nil {
		return nil, err
	}
	file := filepath.Join(dir, "config.json")
	if err := os.WriteFile(file, config, 0o600); err != nil {
		return nil, err
	}
	c := &centrifugo{&world{
		dir: dir, address: address, base: "http://" + address, process: exec.Command(path, "-c", file),
		client: &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 64}},
	}}
	c.process.Stderr = os.Stderr
	if err := c.process.Start(); err != nil {
		return nil, err
	}
	for range 500 {
		if err = c.publish("bench", "0"); err == nil {
			return c, nil
		}
		time.Sleep(20 * time.Millisecond)
	}
	c.stop()
	return nil, err
}

// cpu returns the CPU time that the process has used, which Linux counts in hundredths of a second.
func (c *centrifugo) cpu() (usage, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", c.process.Process.Pid))
	if err != nil {
		return usage{}, err
	}
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+2:]))
	user, err1 := strconv.ParseInt(fields[11], 10, 64)
	system, err2 := strconv.ParseInt(fields[12], 10, 64)
	return usage{CPU: (user + system) * int64(10*time.Millisecond)}, errors.Join(err1, err2)
}

func (c *centrifugo) publish(channel, data string) error {
	body := fmt.Sprintf(`{"channel":%q,"data":%s}`, channel, data)
	request, err := http.NewRequest(http.MethodPost, c.base+"/api/publish", strings.NewReader(body))
	if err != nil {
		return err
	}
	request.Header.Set("X-API-Key", centrifugoSecret)
	response, err := c.client.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	answer, err := io.ReadAll(response.Body)
	if err == nil && (response.StatusCode != http.StatusOK || bytes.Contains(answer, []byte(`"error"`))) {
		err = fmt.Errorf("%s: %s", response.Status, answer)
	}
	return err
}

// open connects a client that asks for subscriptions, and waits for the answer.
func (c *centrifugo) open(connect map[string]any) (net.Conn, []byte, error) {
	encoded, err := json.Marshal(connect)
	if err != nil {
		return nil, nil, err
	}
	conn, err := net.Dial("tcp", c.address)
	if err != nil {
		return nil, nil, err
	}
	fmt.Fprintf(conn, "GET /connection/uni_sse?cf_connect=%s HTTP/1.1\r\nHost: %s\r\n\r\n", url.QueryEscape(string(encoded)), c.address)
	var read []byte
	buffer := make([]byte, 16<<10)
	for {
		n, err := conn.Read(buffer)
		if err != nil {
			return nil, nil, fmt.Errorf("%w after %s", err, read)
		}
		read = append(read, buffer[:n]...)
		if _, rest, found := bytes.Cut(read, []byte(`data: {"connect":`)); found && bytes.Contains(rest, []byte("\n\n")) {
			return conn, read, nil
		}
	}
}

// runCentrifugo measures what sendOverHTTP and comeback measure of Herald.
func runCentrifugo(path string) error {
	for _, channel := range []string{"bench", "kept:bench"} {
		for _, atOnce := range []int{32, 64} {
			c, err := startCentrifugo(path)
			if err != nil {
				return err
			}
			err = c.sendOverHTTP(channel, atOnce)
			c.stop()
			if err != nil {
				return err
			}
		}
	}
	for _, kind := range []string{"guests", "users with a token", "users with a token and 10 missed messages"} {
		c, err := startCentrifugo(path)
		if err != nil {
			return err
		}
		err = c.comeback(kind)
		c.stop()
		if err != nil {
			return err
		}
	}
	return nil
}

func (c *centrifugo) sendOverHTTP(channel string, atOnce int) error {
	conn, rest, err := c.listen(channel)
	if err != nil {
		return err
	}
	c.closeLater(conn)
	c.readers.Go(func() { c.read(conn, rest, false) })
	send := func() error {
		return c.publish(channel, fmt.Sprintf(`{"t":%d,"text":"%s"}`, time.Now().UnixNano(), text))
	}
	const count = 20_000
	for range 100 { // warm
		if err := send(); err != nil {
			return err
		}
	}
	before, err := c.cpu()
	if err != nil {
		return err
	}
	took, err := inParallel(atOnce, count/atOnce, send)
	if err != nil {
		return err
	}
	after, err := c.cpu()
	if err != nil {
		return err
	}
	if err := c.await(int64(100+count/atOnce*atOnce), patience); err != nil {
		return err
	}
	fmt.Printf("Centrifugo, %s, %d at a time: %.1f µs of CPU per message, %.0f messages per second\n",
		channel, atOnce, microseconds(after, before)/count, count/took.Seconds())
	return nil
}

func (c *centrifugo) listen(channel string) (net.Conn, []byte, error) {
	return c.open(map[string]any{"subs": map[string]any{channel: map[string]any{}}})
}

func (c *centrifugo) comeback(kind string) error {
	const n = 3000
	const channel = "kept:room"
	conn, read, err := c.listen(channel)
	if err != nil {
		return err
	}
	conn.Close()
	_, epoch, _ := strings.Cut(string(read), `"epoch":"`)
	epoch, _, _ = strings.Cut(epoch, `"`)
	for i := range 10 {
		if err := c.publish(channel, strconv.Itoa(i+1)); err != nil {
			return err
		}
	}
	connects := make([]map[string]any, n)
	for i := range connects {
		sub := map[string]any{}
		if strings.Contains(kind, "missed") {
			sub = map[string]any{"recover": true, "offset": 0, "epoch": epoch}
		}
		connects[i] = map[string]any{"subs": map[string]any{channel: sub}}
		if strings.Contains(kind, "token") {
			token, err := security.NewJWT(map[string]any{"sub": fmt.Sprint("user", i)}, centrifugoSecret, time.Hour)
			if err != nil {
				return err
			}
			connects[i]["token"] = token
		}
	}
	for round := range 2 { // the first one warms
		before, err := c.cpu()
		if err != nil {
			return err
		}
		conns := make([]net.Conn, n)
		began := time.Now()
		if err := each(n, func(i int) (err error) {
			var read []byte
			if conns[i], read, err = c.open(connects[i]); err == nil && strings.Contains(kind, "missed") && !bytes.Contains(read, []byte(`"data":10`)) {
				err = fmt.Errorf("nothing was recovered: %s", read)
			}
			return err
		}); err != nil {
			return err
		}
		took := time.Since(began)
		after, err := c.cpu()
		if err != nil {
			return err
		}
		for _, conn := range conns {
			conn.Close()
		}
		if round == 1 {
			fmt.Printf("Centrifugo, %d %s come back: %.1f µs of CPU per client, %.2f s\n", n, kind, microseconds(after, before)/n, took.Seconds())
		}
		time.Sleep(2 * time.Second)
	}
	return nil
}
