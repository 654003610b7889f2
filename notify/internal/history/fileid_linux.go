package history

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// fileIdentity distinguishes a file from a copy, even one that took its place, by its inode and its
// creation time (statx(2)). It is empty if these are unknown.
func fileIdentity(path string) string {
	var stat unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, path, 0, unix.STATX_INO|unix.STATX_BTIME, &stat); err != nil {
		return ""
	}
	return fmt.Sprintf("%d %d.%d", stat.Ino, stat.Btime.Sec, stat.Btime.Nsec)
}
