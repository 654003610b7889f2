// The commands that send a single request: send, topics, clients, kick.

package cli

import (
	"encoding/json/jsontext"
	"encoding/json/v2"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"herald/hooks/internal/api"
	"herald/notify"
)

func (c *client) sendCommand() *cobra.Command {
	var users, exceptUsers []string
	var auth, filter, id string
	command := &cobra.Command{
		Use:   "send TOPIC [JSON | @FILE | -]",
		Short: "Send a message and print the report",
		Long:  "Send a message and print the report. Without data, or with -, the data is read from stdin.",
		Example: `  herald notify send example '{"text": "Hello"}'
  herald notify send orders-changed @order.json --user users:RECORD_ID
  date +%s | herald notify send clock`,
		Args: cobra.RangeArgs(1, 2),
		RunE: func(command *cobra.Command, args []string) error {
			source := "-"
			if len(args) > 1 {
				source = args[1]
			}
			data, err := readData(command.InOrStdin(), source)
			if err != nil {
				return err
			}
			// only the given parts: an empty list of users would match nobody
			message := map[string]any{"topic": args[0], "data": data}
			to := map[string]any{}
			narrow := func(flag, part string, value any) {
				if command.Flags().Changed(flag) {
					to[part] = value
				}
			}
			narrow("user", "users", users)
			narrow("auth", "auth", auth)
			narrow("filter", "filter", filter)
			if len(to) > 0 {
				message["to"] = to
			}
			if len(exceptUsers) > 0 {
				message["except"] = map[string]any{"users": exceptUsers}
			}
			if id != "" {
				message["id"] = id
			}
			report, err := c.request(command.Context(), http.MethodPost, "/api/notify", message)
			if err != nil {
				return err
			}
			fmt.Fprintln(command.OutOrStdout(), strings.TrimSpace(string(report)))
			return nil
		},
	}
	flags := command.Flags()
	flags.StringArrayVar(&users, "user", nil, "only to this user, users:RECORD_ID (may be repeated)")
	flags.StringVar(&auth, "auth", "", "only to any, guest, user or superuser")
	flags.StringVar(&filter, "filter", "", "only to users that match a PocketBase filter")
	flags.StringArrayVar(&exceptUsers, "except", nil, "not to this user, users:RECORD_ID (may be repeated)")
	flags.StringVar(&id, "id", "", "makes a retry safe: a message with the same id is sent only once within 5 minutes")
	_ = command.RegisterFlagCompletionFunc("auth", cobra.FixedCompletions([]string{notify.AuthAny, notify.AuthGuest, notify.AuthUser, notify.AuthSuperuser}, cobra.ShellCompDirectiveNoFileComp))
	return command
}

// readData returns the data of a message: source itself, the content of @FILE, or in for "-".
func readData(in io.Reader, source string) (jsontext.Value, error) {
	data, name := []byte(source), "the data"
	var err error
	switch file, isFile := strings.CutPrefix(source, "@"); {
	case source == "-":
		name = "the input"
		data, err = io.ReadAll(in)
	case isFile:
		name = file
		data, err = os.ReadFile(file)
	}
	if err != nil {
		return nil, &ExitError{exitUsage, err}
	}
	value, err := notify.NormalizeJSON(data)
	if err != nil {
		return nil, exitWith(exitUsage, `%s is not JSON; a text needs its own quotes, as in '"text"'`, name)
	}
	return value, nil
}

func (c *client) topicsCommand() *cobra.Command {
	var asJSON bool
	command := &cobra.Command{
		Use:   "topics",
		Short: "List topics with subscribers",
		Args:  cobra.NoArgs,
		RunE: func(command *cobra.Command, _ []string) error {
			topics, raw, err := list[notify.TopicInfo](command.Context(), c, "/api/notify/topics", url.Values{})
			if err != nil || asJSON {
				return printJSON(command, raw, err)
			}
			return printTable(command, "TOPIC\tSUBSCRIBERS\tUSERS", len(topics), func(i int) []any {
				return []any{printable(topics[i].Topic), topics[i].Subscribers, topics[i].Users}
			})
		},
	}
	command.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return command
}

func (c *client) clientsCommand() *cobra.Command {
	var asJSON bool
	var topic, user string
	command := &cobra.Command{
		Use:   "clients",
		Short: "List connected clients",
		Args:  cobra.NoArgs,
		RunE: func(command *cobra.Command, _ []string) error {
			query := url.Values{}
			if topic != "" {
				query.Set("topic", topic)
			}
			if user != "" {
				query.Set("user", user)
			}
			clients, raw, err := list[api.Client](command.Context(), c, "/api/notify/clients", query)
			if err != nil || asJSON {
				return printJSON(command, raw, err)
			}
			header, hasEdges := "CLIENT\tUSER\tNAME\tIP", slices.ContainsFunc(clients, func(client api.Client) bool { return client.Edge != "" })
			if hasEdges {
				header += "\tEDGE"
			}
			return printTable(command, header+"\tCONNECTED\tQUEUED\tSUBSCRIPTIONS", len(clients), func(i int) []any {
				client := clients[i]
				auth, connected := "guest", ""
				if client.Auth != nil {
					auth = *client.Auth
				}
				if client.Connected != nil {
					connected = client.Connected.Time().Local().Format("2006-01-02 15:04:05")
				}
				row := []any{client.ID, auth, printable(client.Name), client.IP}
				if hasEdges {
					row = append(row, client.Edge)
				}
				return append(row, connected, client.Queued, subscriptionsOf(client))
			})
		},
	}
	flags := command.Flags()
	flags.BoolVar(&asJSON, "json", false, "print JSON")
	flags.StringVar(&topic, "topic", "", "only clients subscribed to this topic")
	flags.StringVar(&user, "user", "", "only clients of this user, users:RECORD_ID")
	return command
}

// subscriptionsOf lists the subscriptions of a client, their options as JSON.
func subscriptionsOf(client api.Client) string {
	names := slices.Clone(client.Subscriptions)
	for i, key := range names {
		topic, encoded, hasOptions := strings.Cut(key, "?options=")
		if options, err := url.QueryUnescape(encoded); hasOptions && err == nil {
			names[i] = topic + " " + options
		}
	}
	return printable(strings.Join(names, ", "))
}

func (c *client) kickCommand() *cobra.Command {
	var user string
	command := &cobra.Command{
		Use:   "kick [CLIENT_ID]",
		Short: "Disconnect a client, or all clients of a user",
		Args:  cobra.MaximumNArgs(1),
		RunE: func(command *cobra.Command, args []string) error {
			if len(args) == 1 == (user != "") {
				return exitWith(exitUsage, "give either a client's id or --user")
			}
			path := "/api/notify/clients?user=" + url.QueryEscape(user)
			if len(args) == 1 {
				path = "/api/notify/clients/" + url.PathEscape(args[0])
			}
			answer, err := c.request(command.Context(), http.MethodDelete, path, nil)
			if err != nil {
				return err
			}
			count := struct {
				Disconnected int `json:"disconnected"`
			}{1} // the answer for a single client is empty
			if len(answer) > 0 {
				if err := json.Unmarshal(answer, &count); err != nil {
					return err
				}
			}
			fmt.Fprintf(command.OutOrStdout(), "disconnected %d\n", count.Disconnected)
			if count.Disconnected == 0 {
				return exitWith(exitRefused, "the user has no connection")
			}
			return nil
		},
	}
	command.Flags().StringVar(&user, "user", "", "all connections of this user, users:RECORD_ID")
	return command
}

// printJSON prints a list as JSON, unless there is an error.
func printJSON(command *cobra.Command, items []jsontext.Value, err error) error {
	if err != nil {
		return err
	}
	text, err := json.Marshal(items, jsontext.WithIndent("  "))
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(command.OutOrStdout(), string(text))
	return err
}

// printTable prints a header and rows in columns.
func printTable(command *cobra.Command, header string, rows int, row func(i int) []any) error {
	table := tabwriter.NewWriter(command.OutOrStdout(), 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, header)
	for i := range rows {
		for n, cell := range row(i) {
			if n > 0 {
				fmt.Fprint(table, "\t")
			}
			fmt.Fprint(table, cell)
		}
		fmt.Fprintln(table)
	}
	return table.Flush()
}

// printable replaces characters that could control a terminal, because others chose the text.
func printable(text string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r >= 0x7f && r < 0xa0 {
			return '�'
		}
		return r
	}, text)
}
