package cli_test

import (
	"bufio"
	"context"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/pocketbase/pocketbase/core"
	"github.com/spf13/cobra"

	"herald/hooks"
	"herald/hooks/internal/api"
	"herald/hooks/internal/cli"
	"herald/internal/pbtest"
	"herald/notify"
)

func TestMain(m *testing.M) { pbtest.Main(m) }

func TestSubscriptionsOf(t *testing.T) {
	for want, keys := range map[string][]string{
		"":                         nil,
		`a, b {"query":{"n":"1"}}`: {"a", "b?options=%7B%22query%22%3A%7B%22n%22%3A%221%22%7D%7D"},
		"a?options=%zz":            {"a?options=%zz"},
		"a \uFFFD[2J":              {"a?options=%1b[2J"},
	} {
		if got := cli.SubscriptionsOf(api.Client{Subscriptions: keys}); got != want {
			t.Errorf("%q instead of %q", got, want)
		}
	}
}

// The token that "tail" makes for itself is good for two minutes: on a topic without
// history nothing may be lost when it ends.
func TestTailOutlivesItsToken(t *testing.T) {
	t.Parallel()
	const lasts = 3 * time.Second
	cli.SetTokenLasts(lasts)
	root := &cobra.Command{}
	app := pbtest.NewApp(t, func(app core.App) { hooks.MustRegister(app, root, hooks.Config{}) })
	pbtest.AddAuth(t, app, core.CollectionNameSuperusers, "root@x.com", nil)
	server := pbtest.Serve(t, app)

	root.SetArgs([]string{"notify", "tail", "news", "--url", server.URL})
	out, in := io.Pipe()
	root.SetOut(in)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- root.ExecuteContext(ctx) }()
	defer func() { cancel(); <-ended }()
	pbtest.WaitFor(t, "the command listens", func() bool { return len(notify.Of(app).Topics()) > 1 })

	lines := bufio.NewScanner(out)
	for began, sent := time.Now(), 0; time.Since(began) < 3*lasts; sent++ {
		if err := notify.Notify(app, "news", sent); err != nil {
			t.Fatal(err)
		}
		if !lines.Scan() || !strings.Contains(lines.Text(), `"news"`) {
			t.Fatal(lines.Text(), lines.Err())
		}
	}
	if ended := notify.Of(app).Stats().Disconnects; len(ended) > 0 {
		t.Error("the connection ended: ", ended)
	}
}
