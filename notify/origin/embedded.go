// A NATS server inside this process, for those who need no other.

package origin

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats-server/v2/server"
)

const embeddedScheme = "embedded://"

func isEmbedded(address string) bool { return strings.HasPrefix(address, embeddedScheme) }

// startEmbedded starts a NATS server at an address embedded://[USER:PASSWORD@]HOST:PORT, and returns it and its address
// for clients.
func startEmbedded(address string) (*server.Server, string, error) {
	parsed, err := url.Parse(address)
	if err != nil || parsed.Port() == "" || parsed.Path != "" {
		// without the address, which may have a password in it
		return nil, "", errors.New("the address of the embedded NATS server must be of the form embedded://127.0.0.1:4222")
	}
	port, err := strconv.Atoi(parsed.Port())
	if err != nil || port < 1 || port > 65535 {
		return nil, "", fmt.Errorf("the embedded NATS server cannot listen on port %s", parsed.Port())
	}
	ip := net.ParseIP(parsed.Hostname())
	isLocal := parsed.Hostname() == "localhost" || ip != nil && ip.IsLoopback()
	if !isLocal && parsed.User == nil {
		return nil, "", errors.New("whoever reaches the embedded NATS server can act as an edge: on an address that other machines reach it needs a " +
			"user and a password, embedded://USER:PASSWORD@HOST:PORT")
	}
	options := &server.Options{
		Host: parsed.Hostname(), Port: port, ServerName: "herald", NoSigs: true, NoLog: true,
		MaxPayload: 1 << 20, MaxPending: 64 << 20, WriteDeadline: 10 * time.Second,
	}
	reach := url.URL{Scheme: "nats", Host: parsed.Host, User: parsed.User}
	if host := parsed.Hostname(); host == "0.0.0.0" || host == "::" {
		reach.Host = net.JoinHostPort("127.0.0.1", parsed.Port())
	}
	if parsed.User != nil {
		options.Username = parsed.User.Username()
		options.Password, _ = parsed.User.Password()
		if options.Username == "" || options.Password == "" {
			return nil, "", errors.New("the embedded NATS server needs both a user and a password, or neither")
		}
	}
	// NewServer and Start do not tell whether the address is free
	listener, err := net.Listen("tcp", parsed.Host)
	if err != nil {
		return nil, "", fmt.Errorf("start the embedded NATS server: %w", err)
	}
	listener.Close()
	embedded, err := server.NewServer(options)
	if err != nil {
		return nil, "", fmt.Errorf("start the embedded NATS server: %w", err)
	}
	embedded.Start()
	if !embedded.ReadyForConnections(10 * time.Second) {
		embedded.Shutdown()
		return nil, "", fmt.Errorf("the embedded NATS server does not listen on %s", parsed.Host)
	}
	return embedded, reach.String(), nil
}

func (o *Origin) stopEmbedded() {
	if o.embedded != nil {
		o.embedded.Shutdown()
		o.embedded.WaitForShutdown()
	}
}
