// Why a connection ended.

package conn

// Disconnect says why a connection ended, in logs, metrics and tests.
type Disconnect struct {
	// Code never changes its meaning. 1xxx is the other side's doing, 2xxx that it was too slow, 3xxx
	// that the connection's time was over, 4xxx that a right ended, 5xxx the server's doing.
	Code int
	// Reason is the text for people.
	Reason string
}

// The reasons that a connection finds itself. Others come from its owner.
var (
	Left        = Disconnect{1001, "left"}             // the client closed it, or the network did
	WriteFailed = Disconnect{1002, "write failed"}     // e.g. reset by the peer
	Unexpected  = Disconnect{1003, "unexpected data"}  // it sent something, though a client has nothing to send
	QueueFull   = Disconnect{2001, "queue full"}       // it did not read what was sent to it
	TooSlow     = Disconnect{2002, "too slow"}         // it took nothing for WriteTimeout
	Lifetime    = Disconnect{3001, "lifetime over"}    // see Conn.SetTimeouts
	Idle        = Disconnect{3002, "idle"}             // likewise
	Shutdown    = Disconnect{5001, "shutdown"}         // the server is stopping
	Failed      = Disconnect{5002, "internal error"}   // a panic in its path
	Rejected    = Disconnect{5004, "handler returned"} // its owner's: the request has ended before the connection, see stream.Close
)
