package history

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"

	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"
)

// isDamaged reports whether err means that the file is not a database, or not a complete one.
func isDamaged(err error) bool {
	var failure *sqlite.Error
	if !errors.As(err, &failure) {
		return false
	}
	code := failure.Code() & 0xff // the primary code, without the extended part
	return code == sqlite3.SQLITE_CORRUPT || code == sqlite3.SQLITE_NOTADB
}

// setAside renames the damaged files of the database, so that a person can inspect them. The
// history starts over with another epoch. Only the leader may call it.
func (h *Log) setAside(cause error) error {
	aside := h.config.Path + ".broken-" + h.config.Now().UTC().Format("20060102T150405.000Z")
	if err := os.Rename(h.config.Path, aside); err != nil {
		return err
	}
	for _, suffix := range []string{"-wal", "-shm"} {
		if err := os.Rename(h.config.Path+suffix, aside+suffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	h.damaged.Add(1)
	h.config.Logger().Error("The history of topics was damaged: it starts over, and the damaged files are kept beside it",
		slog.String("path", h.config.Path), slog.String("kept", aside), slog.String("error", cause.Error()))
	return nil
}

// reading handles an error of a query on s, and returns the error for the caller. It sets a damaged
// file aside.
func (h *Log) reading(s *store, err error) error {
	if isDamaged(err) {
		_ = h.exclusive(func(current *store) error {
			if current != s {
				return nil // already set aside
			}
			return err
		})
	}
	return fmt.Errorf("%w: %w", ErrUnavailable, err)
}
