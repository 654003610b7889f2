package api

import (
	"encoding/json/jsontext"

	"github.com/pocketbase/pocketbase/tools/types"

	"herald/notify"
)

// Message is a message as received over HTTP. Its data stays JSON text, because decoding it would
// lose the precision of large numbers.
type Message struct {
	Topic  string          `json:"topic"`
	Data   jsontext.Value  `json:"data"`
	To     notify.Audience `json:"to"`
	Except notify.Except   `json:"except"`
	ID     string          `json:"id"`
}

// Notify returns b in the engine's form.
func (b *Message) Notify() notify.Message {
	return notify.Message{Topic: b.Topic, Data: b.Data, To: b.To, Except: b.Except, ID: b.ID}
}

// Client is a connection as GET /api/notify/clients shows it.
type Client struct {
	ID            string          `json:"id"`
	Auth          *string         `json:"auth"` // "users:ID"; null for a guest
	Name          string          `json:"name"` // the auth record's name, or its email if it has none
	IP            string          `json:"ip"`
	Connected     *types.DateTime `json:"connected"`
	Subscriptions []string        `json:"subscriptions"`
	Queued        int             `json:"queued"`
	Edge          string          `json:"edge,omitzero"` // the edge that holds the connection
}

func newClient(c notify.Connection) Client {
	view := Client{ID: c.ID, IP: c.IP, Subscriptions: c.Subscriptions, Queued: c.Queued, Edge: c.Edge}
	if c.Auth != nil {
		auth := c.Auth.Collection().Name + ":" + c.Auth.Id
		view.Auth = &auth
		view.Name = c.Auth.GetString("name")
		if view.Name == "" {
			view.Name = c.Auth.Email()
		}
	}
	if connected, err := types.ParseDateTime(c.Connected); err == nil && !connected.IsZero() {
		view.Connected = &connected
	}
	return view
}

// Clients returns connections in the form of the API.
func Clients(connections []notify.Connection) []Client {
	views := make([]Client, len(connections))
	for i, connection := range connections {
		views[i] = newClient(connection)
	}
	return views
}
