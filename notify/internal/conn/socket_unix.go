//go:build unix && !linux

package conn

import "syscall"

// tryWrite writes as much of out as the socket takes without waiting. It avoids net's bookkeeping
// for each write, which costs a tenth of the system call.
func tryWrite(fd int, out []byte) (written int, err error) {
	for {
		written, err = syscall.Write(fd, out)
		switch err {
		case syscall.EINTR:
			continue
		case syscall.EAGAIN:
			return 0, nil
		}
		return max(written, 0), err
	}
}
