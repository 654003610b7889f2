// Why connections end.

package notify

import "herald/notify/internal/conn"

// Disconnect says why a connection ended, in logs and metrics.
type Disconnect = conn.Disconnect

// The reasons for which a connection ends.
var (
	DisconnectLeft        = conn.Left        // the client closed it, or the network did
	DisconnectWriteFailed = conn.WriteFailed // e.g. reset by the peer
	DisconnectUnexpected  = conn.Unexpected  // it sent something, though a client has nothing to send

	DisconnectEdge = Disconnect{Code: 1004, Reason: "edge lost"}        // the edge that held it is gone, or has begun anew
	DisconnectGap  = Disconnect{Code: 1005, Reason: "messages missing"} // of a client that was to resume, and must know

	DisconnectQueueFull = conn.QueueFull // it did not read what was sent to it
	DisconnectTooSlow   = conn.TooSlow   // it took nothing for 10 seconds

	DisconnectLifetime = conn.Lifetime // RealtimeConnectRequestEvent.MaxTimeout
	DisconnectIdle     = conn.Idle     // RealtimeConnectRequestEvent.IdleTimeout

	DisconnectTokenExpired = Disconnect{Code: 4001, Reason: "token expired"} // its SDK returns with its current token
	DisconnectAuthEnded    = Disconnect{Code: 4002, Reason: "auth ended"}    // what was queued for the user must not be written any more
	DisconnectRuleFailed   = Disconnect{Code: 4003, Reason: "rule failed"}   // a channel's rule could not be evaluated
	DisconnectDenied       = Disconnect{Code: 4005, Reason: "denied"}        // it is not known which of what waits to be written is denied

	DisconnectShutdown     = conn.Shutdown                                      // the server is stopping
	DisconnectFailed       = conn.Failed                                        // a panic in its path
	DisconnectHandlers     = Disconnect{Code: 5003, Reason: "handlers changed"} // an OnRealtimeMessageSend handler was bound after it connected
	DisconnectRejected     = conn.Rejected                                      // a handler of the connect request ended it
	DisconnectRequested    = Disconnect{Code: 5005, Reason: "disconnected"}     // see Notifier.Disconnect
	DisconnectUnregistered = Disconnect{Code: 5006, Reason: "unregistered"}     // other code removed it from PocketBase's broker
)

// Disconnects are all of the above, for those who also show what has not happened.
func Disconnects() []Disconnect {
	return []Disconnect{
		DisconnectLeft, DisconnectWriteFailed, DisconnectUnexpected, DisconnectEdge, DisconnectGap, DisconnectQueueFull, DisconnectTooSlow,
		DisconnectLifetime, DisconnectIdle, DisconnectTokenExpired, DisconnectAuthEnded, DisconnectRuleFailed, DisconnectShutdown,
		DisconnectFailed, DisconnectHandlers, DisconnectRejected, DisconnectRequested, DisconnectUnregistered,
	}
}
