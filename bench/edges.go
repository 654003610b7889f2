//go:build unix

// Edges, each in its own process.

package main

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"os/exec"
	"time"

	"herald/notify/edge"
)

// serveEdge runs "bench edge NATS ORIGIN ADDRESS".
func serveEdge(nats, origin, address string) error {
	made, err := edge.New(edge.Config{
		NATS: "nats://" + nats, Origin: origin, Name: "edge-" + address[len(address)-5:], Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		return err
	}
	go func() {
		if err := http.ListenAndServe(address, made); err != nil {
			panic(err)
		}
	}()
	return made.Run(context.Background())
}

// startEdges starts edges of the server, to which the clients connect then.
func (w *world) startEdges(count int) error {
	executable, err := os.Executable()
	if err != nil {
		return err
	}
	w.reach = nil
	for range count {
		address, err := freeAddress()
		if err != nil {
			return err
		}
		process := exec.Command(executable, "edge", w.nats, w.base, address)
		process.Stderr = os.Stderr
		if err := process.Start(); err != nil {
			return err
		}
		w.edges = append(w.edges, process)
		w.reach = append(w.reach, address)
		for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
			if response, err := w.client.Get("http://" + address + "/api/health"); err == nil {
				response.Body.Close()
				if response.StatusCode == http.StatusOK {
					break
				}
			}
			if time.Now().After(deadline) {
				return fmt.Errorf("the edge at %s has no origin", address)
			}
		}
	}
	return nil
}
