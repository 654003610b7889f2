//go:build !linux

package notify

import "syscall"

// setUserTimeout leaves it to the system when a peer is given up.
func setUserTimeout(syscall.RawConn) {}
