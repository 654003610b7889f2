package hooks_test

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
	"herald/internal/pbtest"
)

// The token that "tail" makes for itself is good for two minutes: on a topic without
// history nothing may be lost when it ends.
func TestTailOutlivesItsToken(t *testing.T) {
	t.Parallel()
	const lasts = 3 * time.Second
	hooks.SetTokenLasts(lasts)
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
	pbtest.WaitFor(t, "the command listens", func() bool { return len(engine(app).Topics()) > 1 })

	lines := bufio.NewScanner(out)
	for began, sent := time.Now(), 0; time.Since(began) < 3*lasts; sent++ {
		mustSend(t, app, "news", sent)
		if !lines.Scan() || !strings.Contains(lines.Text(), `"news"`) {
			t.Fatal(lines.Text(), lines.Err())
		}
	}
	if ended := engine(app).Stats().Disconnects; len(ended) > 0 {
		t.Error("the connection ended: ", ended)
	}
}
