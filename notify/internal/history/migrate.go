package history

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"log/slog"
	"time"
)

// Versions of the storage format, kept in SQLite's user_version.
const (
	identityVersion = 1 // whom a message is for is stored by ids
	formatVersion   = 2 // messages have rowids
)

// migrate converts what an older version stored to the current format. Where only the last step fails, e.g. because the
// disk has no room for it, the history goes on without it, and it is tried again when the database is opened next.
func (s *store) migrate(ctx context.Context, config *Config) error {
	var version int
	if err := s.write.QueryRowContext(ctx, "PRAGMA user_version").Scan(&version); err != nil || version >= formatVersion {
		return err
	}
	err := s.change(ctx, identityVersion, func(tx *sql.Tx) error {
		if err := addColumns(ctx, tx); err != nil || version == identityVersion {
			return err
		}
		return storeIdentities(ctx, tx, config.Identify)
	})
	if err != nil {
		return err
	}
	err = s.change(ctx, formatVersion, func(tx *sql.Tx) error { return addRowids(ctx, tx, config) })
	if err == nil || isDamaged(err) {
		return err
	}
	// What was written until it failed still takes its room, and the disk may be full. If it cannot be given back now, the
	// next checkpoint does it.
	_, _ = s.write.ExecContext(ctx, "PRAGMA wal_checkpoint(TRUNCATE)")
	config.Logger().Warn("The history of topics stays in an older, slower format until the next start: it could not be converted. That takes as much room again as it has",
		slog.String("path", config.Path), slog.String("error", err.Error()))
	return nil
}

// change calls do and sets the version of the format, both or neither.
func (s *store) change(ctx context.Context, version int, do func(*sql.Tx) error) error {
	tx, err := s.write.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	if err = do(tx); err == nil {
		_, err = tx.ExecContext(ctx, fmt.Sprintf("PRAGMA user_version = %d", version))
	}
	if err == nil {
		err = tx.Commit()
	}
	if err != nil {
		_ = tx.Rollback() // SQLite itself has rolled back after some errors, such as a full disk
	}
	return err
}

// addColumns adds what the table of topics did not have from the beginning.
func addColumns(ctx context.Context, tx *sql.Tx) error {
	for _, column := range []string{"fell", "dipped", "peak"} {
		var has bool
		if err := tx.QueryRowContext(ctx, "SELECT EXISTS (SELECT 1 FROM pragma_table_info('topics') WHERE name = ?)", column).Scan(&has); err != nil {
			return err
		}
		if has {
			continue
		}
		if _, err := tx.ExecContext(ctx, "ALTER TABLE topics ADD COLUMN "+column+" INTEGER NOT NULL DEFAULT 0"); err != nil {
			return err
		}
	}
	return nil
}

// storeIdentities stores by ids whom each message is for.
func storeIdentities(ctx context.Context, tx *sql.Tx, identify func(sent time.Time, audience []byte, sender string) ([]byte, string)) error {
	type row struct {
		topic int64
		Entry
	}
	for last := (row{topic: -1}); ; {
		rows, err := tx.QueryContext(ctx, "SELECT topic, seq, time, sender, audience FROM messages "+
			"WHERE (topic, seq) > (?, ?) AND (audience IS NOT NULL OR sender <> '') ORDER BY topic, seq LIMIT 1000", last.topic, last.Seq)
		if err != nil {
			return err
		}
		var group []row
		for rows.Next() {
			var r row
			var sent int64
			if err := rows.Scan(&r.topic, &r.Seq, &sent, &r.Sender, &r.Audience); err != nil {
				return errors.Join(err, rows.Close())
			}
			r.Time = unixMilli(sent)
			group = append(group, r)
		}
		if err := rows.Err(); err != nil {
			return err
		}
		if len(group) == 0 {
			return nil
		}
		for _, r := range group {
			audience, sender := identify(r.Time, r.Audience, r.Sender)
			if _, err := tx.ExecContext(ctx, "UPDATE messages SET audience = ?, sender = ? WHERE topic = ? AND seq = ?", audience, sender, r.topic, r.Seq); err != nil {
				return err
			}
		}
		last = group[len(group)-1]
	}
}

// addRowids copies the messages, if their table has no rowids yet.
func addRowids(ctx context.Context, tx *sql.Tx, config *Config) error {
	var has bool
	if err := tx.QueryRowContext(ctx, "SELECT NOT wr FROM pragma_table_list('messages') WHERE schema = 'main'").Scan(&has); err != nil || has {
		return err
	}
	config.Logger().Info("The history of topics is converted to a new format", slog.String("path", config.Path))
	_, err := tx.ExecContext(ctx, "ALTER TABLE messages RENAME TO messages_before;"+schema+
		"INSERT INTO messages (topic, seq, time, id, sender, audience, data) SELECT topic, seq, time, id, sender, audience, data FROM messages_before ORDER BY topic, seq;"+
		"DROP TABLE messages_before")
	return err
}
