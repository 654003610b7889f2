//go:build unix

// Command bench compares Herald with what PocketBase's documentation suggests for custom messages:
// a loop that sends to each client. It starts both servers, each in its own process, and loads them
// in turns, in one run.
//
//	go run ./bench [-n 100,1000,5000,10000] [-rounds 3] [-out results.json]
//	go run ./bench -soak 10m
//	go run ./bench -restarts 3
package main

import (
	"encoding/json/jsontext"
	"encoding/json/v2"
	"flag"
	"fmt"
	"log"
	"os"
	"runtime"
	"strconv"
	"strings"
	"time"
)

func main() {
	log.SetFlags(0)
	if len(os.Args) > 1 && os.Args[1] == "serve" {
		if err := serve(os.Args[2:]); err != nil {
			log.Fatal(err)
		}
		return
	}
	if len(os.Args) == 5 && os.Args[1] == "edge" {
		if err := serveEdge(os.Args[2], os.Args[3], os.Args[4]); err != nil {
			log.Fatal(err)
		}
		return
	}
	if len(os.Args) == 5 && os.Args[1] == "probe" {
		if err := runProbe(os.Args[2], os.Args[3], os.Args[4]); err != nil {
			log.Fatal(err)
		}
		return
	}
	sizes := flag.String("n", "100,1000,5000,10000", "numbers of subscribers, separated by commas")
	rounds := flag.Int("rounds", 3, "how many rounds to measure; the result is the median")
	flag.IntVar(&deliveries, "deliveries", deliveries, "how many deliveries to measure per number of subscribers, at least 20 messages")
	only := flag.String("only", "", "measure only loads whose name contains this")
	out := flag.String("out", "", "a file to write the results to, as JSON")
	soakFor := flag.Duration("soak", 0, "instead of measuring, let clients come and go for this long, and check that nothing is lost or left over")
	soakClients := flag.Int("soak-clients", 5000, "how many clients come and go")
	restarts := flag.Int("restarts", 0, "instead of measuring, kill the server so often under clients that listen to a topic with history, and check that each gets every message exactly once")
	restartEdges := flag.Bool("restart-edges", false, "they are connected to four edges, and must not notice")
	restartClients := flag.Int("restart-clients", 10_000, "how many clients that are")
	peer := flag.String("centrifugo", "", "instead of measuring Herald, measure this executable of Centrifugo with the same requests")
	flag.Parse()
	if *peer != "" {
		if err := runCentrifugo(*peer); err != nil {
			log.Fatal(err)
		}
		return
	}
	if *restarts > 0 {
		if err := runRestarts(*restartClients, *restarts, *restartEdges); err != nil {
			log.Fatal("FAIL: ", err)
		}
		return
	}
	if *soakFor > 0 {
		if err := runSoak(*soakClients, *soakFor); err != nil {
			log.Fatal("FAIL: ", err)
		}
		return
	}

	results := &results{Date: time.Now().UTC().Format(time.DateOnly), CPUs: runtime.NumCPU(), CPU: cpuModel(), Go: runtime.Version(), Rounds: *rounds}
	var scenarios []scenario
	for _, size := range strings.Split(*sizes, ",") {
		n, err := strconv.Atoi(size)
		if err != nil || n < 1 {
			log.Fatalf("-n: %q is not a number of subscribers", size)
		}
		scenarios = append(scenarios, scenario{n: n, run: everybody, label: fmt.Sprintf("all of %d", n)})
		scenarios = append(scenarios, scenario{n: n, run: oneAmong, label: fmt.Sprintf("1 of %d", n)})
	}
	scenarios = append(scenarios,
		scenario{n: 200, run: stalled, label: "20 of 200 stalled"},
		scenario{n: 100, run: burst, label: "burst to 100"},
		scenario{n: 1, run: sendOverHTTP(32), label: "messages sent over HTTP, with a superuser's token"},
		scenario{n: 1, run: sendOverHTTP(32), kinds: [2]string{"herald", "publish"}, label: "messages sent over HTTP, on Herald by a superuser and by a user whom a rule lets publish"},
		scenario{n: 1, run: sendOverHTTP(64), kinds: [2]string{"herald", "history"}, label: "messages sent over HTTP, on Herald to a topic without and with history"},
		scenario{n: 3000, run: comeback(false), label: "3000 guests come back"},
		scenario{n: 3000, run: comeback(true), label: "3000 users come back, on Herald to a topic with a rule and 10 missed messages"},
		scenario{n: 9000, run: allAtOnce, label: "9000 users come back in one moment, on Herald to a topic with a rule and 10 missed messages"},
		scenario{n: 1000, run: everybody, kinds: [2]string{"signed-in", "channels"}, label: "all of 1000, Herald without and with channels"},
		scenario{n: 1000, run: everybody, kinds: [2]string{"herald", "history"}, label: "all of 1000, Herald without and with history"},
		scenario{n: 10_000, run: beside, kinds: [2]string{"signed-in", "history"}, label: "a topic with 1 subscriber beside one with 10000, Herald without and with history"},
		scenario{n: 1000, run: everybody, kinds: [2]string{"crowd", "elsewhere"}, label: "all of 1000, Herald without and with presence on another topic"},
		scenario{n: 1000, run: storm, kinds: [2]string{"crowd", "presence"}, label: "1000 join before 1000 watchers in 10 s, Herald without and with presence"},
		scenario{n: 5000, run: comeAndGo, kinds: [2]string{"crowd", "presence"}, label: "5000 join and leave, Herald without and with presence"},
		scenario{n: 5000, run: restart, kinds: [2]string{"crowd", "presence"}, label: "a restart with 5000, Herald without and with presence"},
		scenario{n: 10_000, run: everybody, kinds: [2]string{"herald", "edges"}, label: "all of 10000, Herald without and with 4 edges"},
		scenario{n: 10_000, run: oneAmong, kinds: [2]string{"herald", "edges"}, label: "1 of 10000, Herald without and with 4 edges"},
		scenario{n: 100, run: everybody, http2: true, label: "HTTP/2, all of 100"},
		scenario{n: 1000, run: everybody, http2: true, label: "HTTP/2, all of 1000"},
	)
	for _, s := range scenarios {
		if !strings.Contains(s.label, *only) {
			continue
		}
		for round := range *rounds {
			kinds := s.kinds
			if kinds[0] == "" {
				kinds = [2]string{"snippet", "herald"}
			}
			for i, kind := range kinds {
				fmt.Fprintf(os.Stderr, "%s, round %d, %s\n", s.label, round+1, kind)
				measures, err := s.measure(kind)
				if err != nil {
					log.Fatalf("%s, %s: %v", s.label, kind, err)
				}
				results.add(s.label, i == 0, measures)
			}
		}
	}
	results.print(os.Stdout)
	if *out != "" {
		encoded, err := json.Marshal(results, json.Deterministic(true), jsontext.WithIndent("  "))
		if err == nil {
			err = os.WriteFile(*out, append(encoded, '\n'), 0o644)
		}
		if err != nil {
			log.Fatal(err)
		}
	}
}

func cpuModel() string {
	info, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return runtime.GOARCH
	}
	for line := range strings.Lines(string(info)) {
		if name, model, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
			return strings.TrimSpace(model)
		}
	}
	return runtime.GOARCH
}
