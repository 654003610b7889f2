package conn

import (
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// deadAfter is how long written data may stay unacknowledged before the kernel gives up the
// connection. The kernel's own limit is about 15 minutes (tcp(7), TCP_USER_TIMEOUT and
// tcp_retries2), during which a phone that lost its network would count as connected.
const deadAfter = 60 * time.Second

func setUserTimeout(raw syscall.RawConn) {
	// best effort: not every socket is TCP
	_ = raw.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(deadAfter.Milliseconds()))
	})
}
