package history

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// fileIdentity tells a file from a copy of it, also one that took its place: its
// inode and when that was made (statx(2)). Empty where that is not known.
func fileIdentity(path string) string {
	var stat unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, path, 0, unix.STATX_INO|unix.STATX_BTIME, &stat); err != nil {
		return ""
	}
	return fmt.Sprintf("%d %d.%d", stat.Ino, stat.Btime.Sec, stat.Btime.Nsec)
}
