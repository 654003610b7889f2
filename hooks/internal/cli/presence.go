// The command that shows who is present.

package cli

import (
	"encoding/json/v2"
	"fmt"
	"net/http"
	"net/url"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"herald/notify"
)

func (c *client) presenceCommand() *cobra.Command {
	var asJSON, isWatching bool
	command := &cobra.Command{
		Use:   "presence TOPIC",
		Short: "List the users who are present on a topic",
		Long: `List the users who are subscribed to a topic whose channel has presence.

With --watch, print what changes, as one line of JSON per message.`,
		Example: `  herald notify presence room/42
  herald notify presence room/42 --watch | jq .data`,
		Args: cobra.ExactArgs(1),
		RunE: func(command *cobra.Command, args []string) error {
			if isWatching {
				ctx, stop := signal.NotifyContext(command.Context(), syscall.SIGINT, syscall.SIGTERM)
				defer stop()
				t := &tail{client: c, positions: map[string]string{}, topics: []string{notify.PresencePrefix + args[0]}, out: command.OutOrStdout()}
				return t.run(ctx)
			}
			page, err := c.present(command, args[0])
			if err != nil {
				return err
			}
			if asJSON {
				text, err := json.Marshal(page)
				if err != nil {
					return err
				}
				fmt.Fprintln(command.OutOrStdout(), string(text))
				return nil
			}
			if err := printTable(command, "USER\tSINCE\tCONNECTIONS\tFIELDS\tMETA", len(page.Members), func(i int) []any {
				m := page.Members[i]
				return []any{m.User, strings.Trim(string(m.Since), `"`), m.Connections, printable(string(m.Fields)), printable(string(m.Meta))}
			}); err != nil {
				return err
			}
			fmt.Fprintf(command.OutOrStdout(), "%d users, %d connections of guests\n", page.Total, page.Guests)
			return nil
		},
	}
	flags := command.Flags()
	flags.BoolVar(&asJSON, "json", false, "print JSON")
	flags.BoolVar(&isWatching, "watch", false, "go on, and print what changes")
	return command
}

// present returns all who are present on topic.
func (c *client) present(command *cobra.Command, topic string) (notify.PresencePage, error) {
	var all notify.PresencePage
	for cursor := ""; ; {
		query := url.Values{"topic": {topic}, "limit": {fmt.Sprint(notify.MaxPresencePage)}, "cursor": {cursor}}
		content, err := c.request(command.Context(), http.MethodGet, "/api/notify/presence?"+query.Encode(), nil)
		if err != nil {
			return all, err
		}
		var page notify.PresencePage
		if err := json.Unmarshal(content, &page); err != nil || page.Epoch == "" {
			return all, exitWith(exitUnreachable, "the server that answers is not Herald: the answer is no page of who is present")
		}
		page.Members = append(all.Members, page.Members...)
		all, cursor = page, page.Next
		if cursor == "" {
			return all, nil
		}
	}
}
