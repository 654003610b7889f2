package conn

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// tryWrite writes as much of out as the socket takes without waiting.
//
// It is one system call and little else. It avoids net's bookkeeping for each write, the file layer
// (send(2) instead of write(2)), and telling the scheduler, which is meant for calls that may
// block. Together these cost a fifth of the call itself. out must not be empty.
func tryWrite(fd int, out []byte) (written int, err error) {
	for {
		n, _, errno := syscall.RawSyscall6(unix.SYS_SENDTO, uintptr(fd),
			uintptr(unsafe.Pointer(unsafe.SliceData(out))), uintptr(len(out)),
			syscall.MSG_DONTWAIT|syscall.MSG_NOSIGNAL, 0, 0)
		switch errno {
		case 0:
			return int(n), nil
		case syscall.EINTR:
		case syscall.EAGAIN, syscall.ENOBUFS:
			return 0, nil
		default:
			return 0, errno
		}
	}
}
