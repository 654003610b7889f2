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

// isDamaged reports whether err says that the file is no database, or not a whole one.
func isDamaged(err error) bool {
	var failure *sqlite.Error
	if !errors.As(err, &failure) {
		return false
	}
	code := failure.Code() & 0xff // without what the extended code adds
	return code == sqlite3.SQLITE_CORRUPT || code == sqlite3.SQLITE_NOTADB
}

// setAside renames the damaged files of the database, for a person to look at. The history
// begins anew, with another epoch. Only who leads may call it.
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
	h.config.Logger().Error("The history of topics was damaged: it begins anew, and what there was is kept beside it",
		slog.String("path", h.config.Path), slog.String("kept", aside), slog.String("error", cause.Error()))
	return nil
}

// reading is told of an error of a query on s, and returns it. A damaged file is set
// aside.
func (h *Log) reading(s *store, err error) error {
	if isDamaged(err) {
		_ = h.exclusive(func(current *store) error {
			if current != s {
				return nil // it has been already
			}
			return err
		})
	}
	return fmt.Errorf("%w: %w", ErrUnavailable, err)
}
