package hooks_test

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/pb33f/libopenapi"
	validator "github.com/pb33f/libopenapi-validator"
	"github.com/pocketbase/pocketbase/core"

	"herald/internal/pbtest"
	"herald/notify"
)

// TestOpenAPI compares docs/openapi.yaml with the routes that there are, and with real requests and answers.
func TestOpenAPI(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("../docs/openapi.yaml")
	if err != nil {
		t.Fatal(err)
	}
	document, err := libopenapi.NewDocument(text)
	if err != nil {
		t.Fatal(err)
	}
	checks, errs := validator.NewValidator(document)
	if len(errs) > 0 {
		t.Fatal(errs)
	}
	if ok, problems := checks.ValidateDocument(); !ok {
		t.Fatalf("the document is not valid: %v", problems)
	}
	model, err := document.BuildV3Model()
	if err != nil {
		t.Fatal(err)
	}

	w := newWorld(t)
	addLog(t, w, 100)
	addChannel(t, w, map[string]any{"pattern": "seen", "subscribeRule": "*", "publishRule": "*", "presence": true, "presenceRule": "*", "presenceFields": "name", "rateLimit": 0.01})
	var documented []string
	w.OnServe().BindFunc(func(e *core.ServeEvent) error {
		err := e.Next()
		for path, item := range model.Model.Paths.PathItems.FromOldest() {
			for method := range item.GetOperations().FromOldest() {
				documented = append(documented, strings.ToUpper(method)+" "+path)
				if !e.Router.HasRoute(strings.ToUpper(method), path) {
					t.Errorf("there is no route %s %s", method, path)
				}
			}
		}
		return err
	})
	server := pbtest.Serve(t, w)
	for _, route := range routesOf(t) {
		if !slices.Contains(documented, route) {
			t.Errorf("%s is not documented", route)
		}
	}

	client := server.Subscribe(t, w.ann, "log/a", "seen")
	send(t, w, notify.Message{Topic: "log/a", Data: 1})
	since := ""
	if head := historyOf(t, server, w.ann, "log/a", "", 10); head.Next != "" {
		since = head.Next
	}
	send(t, w, notify.Message{Topic: "log/a", Data: map[string]any{"text": "2"}})
	ref := pbtest.Ref(w.ann)
	tested := map[string]bool{}
	for _, test := range []struct {
		who                *core.Record
		method, path, body string
		status             int
		isInvalid          bool // the request is not as documented
	}{
		{w.root, "POST", "/api/notify", `{"topic":"log/a","data":3,"id":"m","to":{"auth":"user","users":["` + ref + `"],"filter":"verified = false"},"except":{"clients":[]}}`, 200, false},
		{w.root, "POST", "/api/notify", `{"topic":"x","data":null}`, 200, false},
		{w.root, "POST", "/api/notify", `{"topic":"x"}`, 400, true},
		{w.root, "POST", "/api/notify", `{"topic":"x","data":1,"to":{}}`, 400, true},
		{w.root, "POST", "/api/notify", `{"topic":"x","data":1,"to":{"user":[]}}`, 400, true},
		{w.root, "POST", "/api/notify", `{"topic":"x","data":1,"to":{"auth":"x"}}`, 400, true},
		{w.root, "POST", "/api/notify", `{"topic":"@x","data":1}`, 400, false},
		{w.ann, "POST", "/api/notify", `{"topic":"x","data":1}`, 403, false},
		{w.root, "POST", "/api/notify/batch", `{"messages":[{"topic":"log/a","data":4},{"topic":"@x","data":1}]}`, 200, false},
		{w.root, "POST", "/api/notify/batch", `{"messages":[]}`, 400, true},
		{w.ann, "POST", "/api/notify/publish", `{"topic":"log/a","data":5,"self":false,"clientId":"` + client.ID + `","except":{"users":[]}}`, 200, false},
		{w.root, "POST", "/api/notify/publish", `{"topic":"log/a","data":5}`, 200, false},
		{nil, "POST", "/api/notify/publish", `{"topic":"closed","data":5}`, 403, false},
		{w.ann, "POST", "/api/notify/publish", `{"topic":"seen","data":5}`, 200, false},
		{w.ann, "POST", "/api/notify/publish", `{"topic":"seen","data":5}`, 429, false},
		{nil, "GET", "/api/notify/history?topic=log/a&since=" + since + "&limit=2", "", 200, false},
		{nil, "GET", "/api/notify/history?topic=nothing", "", 200, false},
		{nil, "GET", "/api/notify/history?topic=log/a&clientId=a&subscription=log/a", "", 200, false},
		{nil, "GET", "/api/notify/history?topic=log/a&since=x", "", 400, false},
		{nil, "POST", "/api/notify/history", `{"topics":[{"topic":"log/a","rewind":"2","subscription":"log/a"},{"topic":"@x"}],"clientId":"a"}`, 200, false},
		{nil, "POST", "/api/notify/history", `{"topics":[]}`, 400, true},
		{nil, "GET", "/api/notify/presence?topic=seen", "", 200, false},
		{nil, "GET", "/api/notify/presence?topic=seen&count=1", "", 200, false},
		{nil, "GET", "/api/notify/presence?topic=log/a", "", 403, false},
		{w.ann, "PUT", "/api/notify/presence", `{"topic":"seen","meta":{"typing":true},"visible":true}`, 204, false},
		{nil, "PUT", "/api/notify/presence", `{"topic":"seen","meta":1}`, 403, false},
		{w.ann, "DELETE", "/api/notify/presence?topic=seen&clientId=" + client.ID + "&grace=1", "", 204, false},
		{w.ann, "DELETE", "/api/notify/presence?topic=seen&clientId=" + client.ID + "&grace=99", "", 400, true},
		{w.root, "GET", "/api/notify/presence/users?user=" + ref, "", 200, false},
		{w.root, "GET", "/api/notify/presence/users?user=users:no", "", 200, false},
		{w.root, "POST", "/api/notify/recheck", `{"user":"` + ref + `"}`, 200, false},
		{w.root, "POST", "/api/notify/recheck", `{"users":1}`, 400, true},
		{w.root, "GET", "/api/notify/topics?page=1&perPage=10", "", 200, false},
		{w.root, "GET", "/api/notify/clients?topic=log/a&user=" + ref, "", 200, false},
		{nil, "GET", "/api/notify/clients", "", 401, false},
		{w.root, "GET", "/api/notify/stats", "", 200, false},
		{w.root, "GET", "/api/notify/metrics", "", 200, false},
		{w.root, "DELETE", "/api/notify/clients/nobody", "", 404, false},
		{w.root, "DELETE", "/api/notify/clients/" + client.ID, "", 204, false},
		{w.root, "DELETE", "/api/notify/clients?user=" + ref, "", 200, false},
	} {
		name := fmt.Sprintf("%s %s %s: %d", test.method, test.path, test.body, test.status)
		request := func() *http.Request {
			r, err := http.NewRequest(test.method, server.URL+test.path, strings.NewReader(test.body))
			if err != nil {
				t.Fatal(err)
			}
			if test.body != "" {
				r.Header.Set("Content-Type", "application/json")
			}
			if test.who != nil {
				r.Header.Set("Authorization", pbtest.Token(t, test.who))
			}
			return r
		}
		response, err := server.Client().Do(request())
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(response.Body)
		response.Body.Close()
		if err != nil {
			t.Fatal(err)
		}
		response.Body = io.NopCloser(bytes.NewReader(body))
		if response.StatusCode != test.status {
			t.Errorf("%s: %d %s", name, response.StatusCode, body)
			continue
		}
		documented := request()
		if test.status == http.StatusUnauthorized || test.who == nil { // that a token is missing is the point
			documented.Header.Set("Authorization", "x")
		}
		if ok, problems := checks.ValidateHttpRequest(documented); ok == test.isInvalid {
			t.Errorf("%s: the request is valid: %v, %v", name, ok, problems)
		}
		if ok, problems := checks.ValidateHttpResponse(request(), response); !ok {
			for _, problem := range problems {
				t.Errorf("%s: %s: %s %v\n%s", name, problem.Message, problem.Reason, problem.SchemaValidationErrors, body)
			}
		}
		path, _, _ := strings.Cut(test.path, "?")
		if strings.HasPrefix(path, "/api/notify/clients/") {
			path = "/api/notify/clients/{id}"
		}
		tested[test.method+" "+path] = true
	}
	for _, route := range documented {
		if !tested[route] {
			t.Errorf("%s is not tried", route)
		}
	}
}

// routesOf returns the routes below /api/notify that the package adds, as its source names them.
func routesOf(t *testing.T) (routes []string) {
	t.Helper()
	pattern := regexp.MustCompile(`(Router|api)\.(GET|POST|PUT|PATCH|DELETE)\("([^"]*)"`)
	files, err := os.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		if strings.HasSuffix(file.Name(), "_test.go") || !strings.HasSuffix(file.Name(), ".go") {
			continue
		}
		source, err := os.ReadFile(file.Name())
		if err != nil {
			t.Fatal(err)
		}
		for _, match := range pattern.FindAllSubmatch(source, -1) {
			path := string(match[3])
			if string(match[1]) == "api" {
				path = "/api/notify" + path
			}
			if strings.HasPrefix(path, "/api/notify") {
				routes = append(routes, string(match[2])+" "+path)
			}
		}
	}
	if len(routes) < 16 {
		t.Fatalf("found only %v", routes)
	}
	return routes
}
