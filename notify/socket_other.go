//go:build !unix

package notify

// tryWrite takes nothing: here there is no write that does not wait, so all is
// left to a goroutine of the connection's own (writeSlowly).
func tryWrite(int, []byte) (written int, err error) { return 0, nil }
