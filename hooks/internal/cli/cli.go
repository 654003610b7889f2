// Package cli is the command line, "herald notify …", which talks to the running server over HTTP.
package cli

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json/jsontext"
	"encoding/json/v2"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/hook"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"herald/hooks/internal/api"
)

// The exit codes of the commands.
const (
	exitRefused     = 1 // the server refused, or did not find what was requested
	exitUsage       = 2 // wrong arguments
	exitUnreachable = 3 // no server answers
)

// ExitError is the error of a command, with the code to exit with.
type ExitError struct {
	Code int
	err  error
}

func (e *ExitError) Error() string { return e.err.Error() }

// Unwrap returns the cause.
func (e *ExitError) Unwrap() error { return e.err }

func exitWith(code int, format string, args ...any) error {
	return &ExitError{code, fmt.Errorf(format, args...)}
}

// Bind adds the command "notify" to root, and cobra's "completion".
func Bind(app core.App, root *cobra.Command) {
	c := &client{app: app, tokenLasts: tokenLasts}
	// Execute opens the databases for every command, and first creates the data directory. Our
	// commands open them only if they need a token from there (see makeToken).
	app.OnBootstrap().Bind(&hook.Handler[*core.BootstrapEvent]{
		Id: "heraldCommands",
		Func: func(e *core.BootstrapEvent) error {
			if found, _, err := root.Find(os.Args[1:]); err == nil && (isBelow(found, "notify") || isBelow(found, "edge")) && !c.opens {
				slog.SetDefault(slog.New(slog.DiscardHandler)) // hides PocketBase's warning that nothing was opened
				return nil
			}
			return e.Next()
		},
		Priority: math.MinInt,
	})
	command := &cobra.Command{
		Use:   "notify",
		Short: "Send and watch realtime messages of a running server",
		Long: `Send and watch realtime messages of a running server, and see who is connected.

On the server's machine, with access to its data directory, you need not sign in. Elsewhere, give
--url and a superuser's token, with --token or HERALD_TOKEN.

Exit codes: 0 success, 1 refused by the server, 2 wrong arguments, 3 no server answers.`,
		SilenceUsage: true,
	}
	flags := command.PersistentFlags()
	flags.StringVar(&c.url, "url", cmp.Or(os.Getenv("HERALD_URL"), "http://127.0.0.1:8090"), "the server's address (or HERALD_URL)")
	flags.StringVar(&c.token, "token", "", "a superuser's token (or HERALD_TOKEN)")
	command.AddCommand(c.sendCommand(), c.tailCommand(), c.topicsCommand(), c.clientsCommand(), c.presenceCommand(), c.kickCommand(), c.benchCommand())
	command.RunE = func(command *cobra.Command, args []string) error {
		if len(args) > 0 {
			return exitWith(exitUsage, "there is no command %q: see %s --help", args[0], command.CommandPath())
		}
		return command.Help()
	}
	for _, sub := range command.Commands() {
		sub.SilenceUsage = true
		sub.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return &ExitError{exitUsage, err} })
		args := sub.Args
		sub.Args = func(command *cobra.Command, given []string) error {
			if err := cmp.Or(args(command, given), noEmptyFlags(command)); err != nil {
				return &ExitError{exitUsage, err}
			}
			return nil
		}
	}
	hideServerFlags(root, command)
	root.AddCommand(command, edgeCommand(app, root))
	root.CompletionOptions.DisableDefaultCmd = false
}

// noEmptyFlags refuses a flag whose value is empty. Such a value comes from an unset variable:
// --filter "$NOT_SET" must not select everyone, and --token "$NOT_SET" must not select another
// identity.
func noEmptyFlags(command *cobra.Command) (err error) {
	command.Flags().Visit(func(flag *pflag.Flag) {
		values := []string{flag.Value.String()}
		if list, ok := flag.Value.(pflag.SliceValue); ok {
			values = list.GetSlice()
		}
		for _, value := range values {
			if strings.TrimSpace(value) == "" {
				err = fmt.Errorf("--%s is empty", flag.Name)
			}
		}
	})
	return err
}

// hideServerFlags hides the flags that only "serve" uses from the help of command.
func hideServerFlags(root, command *cobra.Command) {
	help := command.HelpFunc()
	command.SetHelpFunc(func(command *cobra.Command, args []string) {
		root.PersistentFlags().VisitAll(func(flag *pflag.Flag) { flag.Hidden = flag.Name != "dir" })
		help(command, args)
	})
}

// isBelow reports whether command has that name or is below a command with that name.
func isBelow(command *cobra.Command, name string) bool {
	for ; command != nil; command = command.Parent() {
		if command.Name() == name {
			return true
		}
	}
	return false
}

// client is the state that the commands share.
type client struct {
	app   core.App
	url   string
	token string
	made  made
	// tokenLasts is how long a token made for a request is valid.
	tokenLasts time.Duration
	opens      bool // whether the command is opening the databases
}

// httpClient keeps more idle connections than the default client, which would open one for nearly
// each message of "bench".
var httpClient = func() *http.Client {
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.MaxIdleConnsPerHost = 64
	return &http.Client{Transport: transport}
}()

// tokenLasts is client.tokenLasts of commands that are made from now on. Only tests change it.
var tokenLasts = 2 * time.Minute

// made is a token made from the database. It is used for half of its lifetime, because "bench"
// would otherwise measure the lookup of a superuser for each request.
type made struct {
	mu    sync.Mutex // guards the fields below
	token string
	at    time.Time
}

// authorization returns the token to send: the given one or, for a server on this machine, one made
// from its database.
func (c *client) authorization() (string, error) {
	if token := c.givenToken(); token != "" {
		return token, nil
	}
	address, err := url.Parse(c.url)
	if err != nil || address.Host == "" {
		return "", exitWith(exitUsage, "--url %q is not an address such as http://127.0.0.1:8090", c.url)
	}
	// a token is as valuable as a password: never send it to another machine
	if ip := net.ParseIP(address.Hostname()); address.Hostname() != "localhost" && (ip == nil || !ip.IsLoopback()) {
		return "", exitWith(exitUsage, "for a server on another machine, give --token or HERALD_TOKEN")
	}
	return c.makeToken()
}

// givenToken returns the token from the command line or the environment, or "".
func (c *client) givenToken() string { return cmp.Or(c.token, os.Getenv("HERALD_TOKEN")) }

// makeToken returns a token made from the database. It opens the database if necessary.
func (c *client) makeToken() (string, error) {
	c.made.mu.Lock()
	defer c.made.mu.Unlock()
	if time.Since(c.made.at) < c.tokenLasts/2 {
		return c.made.token, nil
	}
	noSuperuser := func(err error) error {
		return exitWith(exitRefused, "there is no superuser in %s: create one with \"superuser create\", or give --token (%w)", c.app.DataDir(), err)
	}
	if !c.app.IsBootstrapped() {
		if _, err := os.Stat(c.app.DataDir()); err != nil {
			return "", exitWith(exitRefused, "there is no data directory here: give the server's with --dir, or a --token (%w)", err)
		}
		c.opens = true
		if err := c.app.Bootstrap(); err != nil {
			return "", err
		}
	}
	superuser := &core.Record{}
	if err := c.app.RecordQuery(core.CollectionNameSuperusers).OrderBy("created").Limit(1).One(superuser); err != nil {
		return "", noSuperuser(err)
	}
	token, err := superuser.NewStaticAuthToken(c.tokenLasts)
	if err == nil {
		c.made.token, c.made.at = token, time.Now()
	}
	return token, err
}

// answersWithin is how long to wait for an answer.
const answersWithin = 30 * time.Second

// errNotNow marks an answer, of a server or of a proxy before it, that may soon be different.
var errNotNow = errors.New("try again")

// request sends a request and returns the body of the answer. If the answer is an error, it returns
// an error that names the invalid fields.
func (c *client) request(ctx context.Context, method, path string, body any) ([]byte, error) {
	token, err := c.authorization()
	if err != nil {
		return nil, err
	}
	var reader io.Reader
	if body != nil {
		encoded, err := json.Marshal(body)
		if err != nil {
			return nil, err
		}
		reader = bytes.NewReader(encoded)
	}
	ctx, cancel := context.WithTimeout(ctx, answersWithin)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, method, strings.TrimSuffix(c.url, "/")+path, reader)
	if err != nil {
		return nil, &ExitError{exitUsage, err}
	}
	request.Header.Set("Authorization", token)
	request.Header.Set("Content-Type", "application/json")
	response, err := httpClient.Do(request)
	if err != nil {
		return nil, exitWith(exitUnreachable, "no server answers: %w", err)
	}
	defer response.Body.Close()
	content, err := io.ReadAll(response.Body)
	if err != nil {
		return nil, exitWith(exitUnreachable, "the answer was interrupted: %w", err)
	}
	if response.StatusCode >= http.StatusBadRequest {
		return nil, refusal(response.StatusCode, content)
	}
	if len(content) > 0 && !jsontext.Value(content).IsValid() {
		return nil, exitWith(exitUnreachable, "the server that answers is not Herald: %d, but not JSON", response.StatusCode)
	}
	return content, nil
}

// refusal turns an error in PocketBase's form into one line. An error in any other form comes from
// a proxy before the server.
func refusal(status int, content []byte) error {
	var answer struct {
		Status  int    `json:"status"`
		Message string `json:"message"`
		Data    any    `json:"data"`
	}
	if err := json.Unmarshal(content, &answer); err != nil || answer.Message == "" || answer.Status != status {
		return exitWith(exitUnreachable, "the server answered %d %s", status, http.StatusText(status))
	}
	if status >= http.StatusInternalServerError || status == http.StatusTooManyRequests {
		return exitWith(exitRefused, "%s (%d): %w", answer.Message, status, errNotNow)
	}
	if fields := api.FieldMessages("", answer.Data); len(fields) > 0 {
		return exitWith(exitRefused, "%s %s", answer.Message, strings.Join(fields, "; "))
	}
	return exitWith(exitRefused, "%s (%d)", answer.Message, status)
}

// list returns all items of a paged list.
func list[T any](ctx context.Context, c *client, path string, query url.Values) (items []T, raw []jsontext.Value, err error) {
	query.Set("perPage", "1000")
	for page := 1; ; page++ {
		query.Set("page", strconv.Itoa(page))
		content, err := c.request(ctx, http.MethodGet, path+"?"+query.Encode(), nil)
		if err != nil {
			return nil, nil, err
		}
		var answer struct {
			Items      []jsontext.Value `json:"items"`
			TotalPages int              `json:"totalPages"`
		}
		if err := json.Unmarshal(content, &answer); err != nil {
			return nil, nil, exitWith(exitRefused, "the answer is not a list: %w", err)
		}
		for _, text := range answer.Items {
			var item T
			if err := json.Unmarshal(text, &item); err != nil {
				return nil, nil, exitWith(exitRefused, "the answer cannot be understood: %w", err)
			}
			items, raw = append(items, item), append(raw, text)
		}
		if page >= answer.TotalPages {
			return items, raw, nil
		}
	}
}
