package notify

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// tryWrite writes of out what the socket takes without waiting.
//
// It is one system call and little else: without net's bookkeeping for each
// write, without the file layer (send(2) instead of write(2)), and without
// telling the scheduler, which is for calls that may block. Together these cost
// a fifth of the call itself. out is not empty.
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
