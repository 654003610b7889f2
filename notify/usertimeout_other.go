//go:build !linux

package notify

import "syscall"

// setUserTimeout leaves it to the system when to give up a peer.
func setUserTimeout(syscall.RawConn) {}
