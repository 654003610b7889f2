package tests

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"syscall"
	"testing"
	"time"

	"github.com/pocketbase/pocketbase/core"

	"herald/notify"
	"herald/notify/edge"
	"herald/notify/origin"
)

// serveThroughEdge answers a request as the client of an edge gets it: pocketbase-tests puts it in the place of the call
// that serves the request of a scenario.
func serveThroughEdge(t testing.TB, app core.App, mux http.Handler, recorder *httptest.ResponseRecorder, request *http.Request) {
	address := freeAddress(t)
	o, err := origin.New(app, notify.Of(app), origin.Config{NATS: "embedded://" + address})
	if err != nil {
		t.Fatal(err)
	}
	defer o.Close(time.Second)
	if err := o.Serve(mux); err != nil {
		t.Fatal(err)
	}
	direct := httptest.NewServer(mux)
	defer direct.Close()

	e, err := edge.New(edge.Config{NATS: "nats://" + address, Name: "edge", Origin: direct.URL, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() { ended <- e.Run(ctx) }()
	defer func() {
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}()
	for deadline := time.Now().Add(10 * time.Second); !e.Stats().Joined; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the edge does not join the origin")
		}
	}
	server := httptest.NewServer(e)
	defer server.Close()

	sent, err := http.NewRequest(request.Method, server.URL+request.URL.RequestURI(), request.Body)
	if err != nil {
		t.Fatal(err)
	}
	sent.Header = request.Header
	answer, err := http.DefaultTransport.RoundTrip(sent) // which follows no redirects
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	maps.Copy(recorder.Header(), answer.Header)
	recorder.WriteHeader(answer.StatusCode)
	if _, err := io.Copy(recorder, answer.Body); err != nil {
		t.Fatal(err)
	}
}

// freeAddress is as in herald/internal/pbtest, which other modules cannot import.
func freeAddress(t testing.TB) string {
	for {
		listener, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", 11_000+rand.IntN(20_000)))
		if err == nil {
			defer listener.Close()
			return listener.Addr().String()
		}
		if !errors.Is(err, syscall.EADDRINUSE) {
			t.Fatal(err)
		}
	}
}
