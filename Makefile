# Go fetches the toolchain that go.mod asks for by itself.
export GOTOOLCHAIN = auto

HTTP ?= 127.0.0.1:8090
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
SDK := pb_public/lib/pocketbase.es.mjs

.DEFAULT_GOAL := help

.PHONY: run
run: build ## build Herald and serve on http://127.0.0.1:8090 (HTTP=… for another address)
	@printf '\n  Open      http://$(HTTP)/    the playground\n'
	@printf '  Dashboard http://$(HTTP)/_/\n'
	@printf '  Data      bin/pb_data\n'
	@printf '  Superuser bin/herald superuser upsert EMAIL PASSWORD\n\n'
	@bin/herald serve --http=$(HTTP)

.PHONY: demo
demo: node_modules/.complete build ## a chat with two users, in a folder that is gone afterwards (HTTP=… for another address)
	@npm run --silent build -w examples/chat -- --logLevel warn
	@HTTP=$(HTTP) node examples/chat/demo.mjs

.PHONY: build
build: $(SDK) ## build bin/herald: one static executable with page and migrations inside
	CGO_ENABLED=0 go build -trimpath -ldflags "-s -w -X main.version=$(VERSION)" -o bin/herald .

# The page's SDK comes from npm and is embedded. Without Node the build goes on
# and the page says what is missing.
.PHONY: $(SDK)
$(SDK):
	@if ! command -v npm >/dev/null 2>&1; then \
		echo "npm was not found: the page is built without the PocketBase SDK"; \
	else \
		if [ ! -f $@ ] || [ package-lock.json -nt $@ ]; then \
			{ [ node_modules/.package-lock.json -nt package-lock.json ] || npm ci --omit=dev --loglevel=error; } && \
			cp node_modules/pocketbase/dist/pocketbase.es.mjs $@ || \
			echo "npm could not fetch the PocketBase SDK: the page is built without it"; \
		fi; \
	fi

# SQLite, which is translated from C, is not instrumented: it has locks of its own, and is half of what the tests compute.
RACE := -race '-gcflags=modernc.org/...=-race=false -d=checkptr=0'

.PHONY: test
test: node_modules/.complete build ## run all tests: engine, HTTP, PocketBase's own, JS SDK, browser (needs Node and Chromium)
	go test $(RACE) -count 1 -timeout 20m -parallel 8 ./...
	.ci/pocketbase-tests
	node --test --test-concurrency=3 --test-timeout=300000 e2e/*.test.mjs

node_modules/.complete: package-lock.json
	@command -v npm >/dev/null 2>&1 || { echo "the tests need Node.js with npm, for the JS SDK and the browser"; exit 1; }
	npm ci --loglevel=error
	@touch $@

# golangci-lint is run and not a tool of go.mod, which would get its 200 dependencies. It must be built with the Go
# that the module is for.
GOLANGCI := github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.15.0

.PHONY: lint
lint: ## golangci-lint (go vet, staticcheck and others: .golangci.yaml), gofmt, govulncheck (where its database can be reached)
	GOTOOLCHAIN=$$(go env GOVERSION) go run $(GOLANGCI) run ./...
	@# run directly: "go tool" does not hand on the status 3, which means that it found something
	@$$(go tool -n govulncheck) ./... || { \
		[ $$? -ne 3 ] || exit 3; \
		echo "govulncheck could not run (is its database reachable?)"; \
	}

.PHONY: fuzz
fuzz: ## fuzz topics, frames and patterns, 30 s each
	go test -run '^$$' -fuzz FuzzFrame -fuzztime 30s ./notify
	go test -run '^$$' -fuzz FuzzTopic -fuzztime 30s ./notify
	go test -run '^$$' -fuzz FuzzPattern -fuzztime 30s ./notify/internal/rules

GORELEASER := github.com/goreleaser/goreleaser/v2@v2.14.0

.PHONY: snapshot
snapshot: ## build a release for all platforms in dist/, by .goreleaser.yaml, and publish nothing
	go run $(GORELEASER) check
	go run $(GORELEASER) release --snapshot --clean

.PHONY: bench
bench: ## measure Herald against the snippet of PocketBase's documentation (10 minutes; ARGS="-n 1000 -rounds 1")
	go test -run '^$$' -bench . -benchmem ./notify/... ./hooks
	go build -o bin/bench ./bench
	bin/bench -out bin/bench.json $(ARGS)

.PHONY: soak
soak: ## 5,000 clients that come, stall, leave and return, for 10 minutes; 10,000 over three restarts, and 2,000 behind edges (ARGS="-soak 1m")
	go build -o bin/bench ./bench
	bin/bench $(or $(ARGS),-soak 10m)
	bin/bench -restarts 3
	bin/bench -restarts 3 -restart-edges -restart-clients 2000

.PHONY: chaos
chaos: node_modules/.complete build ## 50 kills, 2 minutes of a network that fails, processes stopped for up to 75 s (CHAOS_SEED=… for the same faults again)
	CRASHES=$(or $(CRASHES),50) CHAOS_SECONDS=$(or $(CHAOS_SECONDS),120) node --test --test-concurrency=1 \
		--test-name-pattern='kill -9|fails at random' e2e/crash.test.mjs e2e/herald.test.mjs
	EDGE_LONG=1 node --test --test-name-pattern='stopped for long' e2e/edge.test.mjs

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## (.*)/\1\t\2/' | expand -t 10
