//go:build !linux

package conn

import "syscall"

// setUserTimeout leaves it to the system when to give up a peer.
func setUserTimeout(syscall.RawConn) {}
