package notify

import "time"

// The defaults of [Config].
const (
	DefaultQueueSize  = 256
	DefaultQueueBytes = 1 << 20
	DefaultMaxSize    = 256 << 10
	DefaultHeartbeat  = 25 * time.Second
)

// Config holds the options of a [Notifier]. The zero value works.
type Config struct {
	// QueueSize is how many messages may wait for one connection. A connection with more waiting
	// messages is disconnected: it does not read, and an unbounded queue would exhaust the server's
	// memory. Defaults to 256.
	QueueSize int

	// QueueBytes is how many bytes may wait for one connection. Defaults to 1 MiB.
	QueueBytes int

	// Heartbeat is how long a connection may be idle before it gets a comment line, which keeps
	// proxies from closing it and detects dead connections. Defaults to 25 s; a negative value
	// turns heartbeats off.
	Heartbeat time.Duration

	// Hooked reports whether other code wants to see each message to each connection, as
	// OnRealtimeMessageSend handlers do. Connections that were taken ([Client.TakeConn]) then get
	// no more messages and are closed. Defaults to never.
	Hooked func() bool

	// MaxSize is the largest accepted message data in bytes, as compact JSON.
	// Defaults to DefaultMaxSize, 256 KiB.
	MaxSize int

	// Strict refuses topics that no channel matches, except to superusers and the server's own
	// code. Without it anyone may subscribe to them.
	Strict bool

	// MaxMeta is how many bytes of JSON a user may show about themselves on a topic with presence.
	// Defaults to 1 KiB; at most 4 KiB.
	MaxMeta int

	// OnPresence is called when somebody has come to or left a topic with presence, or shows
	// something else. It is called for one topic after another; watchers of that topic wait for it.
	OnPresence func(PresenceChange)

	// HistoryPath is the file of the database with the history of topics. It is created when the
	// first channel has history. Defaults to "notify_history.db" in the application's data
	// directory.
	HistoryPath string

	// IDWindow is how long the id of a message is remembered, so that a retry with the same id is
	// not sent twice. Defaults to 5 minutes.
	IDWindow time.Duration
}

func (c Config) withDefaults() Config {
	if c.QueueSize <= 0 {
		c.QueueSize = DefaultQueueSize
	}
	if c.MaxSize <= 0 {
		c.MaxSize = DefaultMaxSize
	}
	if c.QueueBytes <= 0 {
		c.QueueBytes = DefaultQueueBytes
	}
	if c.MaxMeta <= 0 {
		c.MaxMeta = DefaultMaxMeta
	}
	c.MaxMeta = min(c.MaxMeta, MaxMeta)
	if c.Heartbeat == 0 {
		c.Heartbeat = DefaultHeartbeat
	}
	if c.IDWindow <= 0 {
		c.IDWindow = 5 * time.Minute
	}
	return c
}

func (n *Notifier) hooked() bool { return n.config.Hooked != nil && n.config.Hooked() }
