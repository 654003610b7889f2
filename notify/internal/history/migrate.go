package history

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"
)

// Versions of the storage format, kept in SQLite's user_version.
const (
	identityVersion = 1 // whom a message is for is stored by ids
	formatVersion   = 2 // messages have rowids
)

// migrate converts what an older version stored to the current format.
func (s *store) migrate(ctx context.Context, identify func(sent time.Time, audience []byte, sender string) ([]byte, string)) (err error) {
	var version int
	if err := s.write.QueryRowContext(ctx, "PRAGMA user_version").Scan(&version); err != nil || version >= formatVersion {
		return err
	}
	tx, err := s.write.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, tx.Rollback())
		}
	}()
	type row struct {
		topic int64
		Entry
	}
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
	if err := addRowids(ctx, tx); err != nil {
		return err
	}
	for last := (row{topic: -1}); version < identityVersion; {
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
			break
		}
		for _, r := range group {
			audience, sender := identify(r.Time, r.Audience, r.Sender)
			if _, err := tx.ExecContext(ctx, "UPDATE messages SET audience = ?, sender = ? WHERE topic = ? AND seq = ?", audience, sender, r.topic, r.Seq); err != nil {
				return err
			}
		}
		last = group[len(group)-1]
	}
	if _, err := tx.ExecContext(ctx, fmt.Sprintf("PRAGMA user_version = %d", formatVersion)); err != nil {
		return err
	}
	return tx.Commit()
}

// addRowids copies the messages, if their table has no rowids yet.
func addRowids(ctx context.Context, tx *sql.Tx) error {
	var has bool
	if err := tx.QueryRowContext(ctx, "SELECT NOT wr FROM pragma_table_list('messages') WHERE schema = 'main'").Scan(&has); err != nil || has {
		return err
	}
	_, err := tx.ExecContext(ctx, "ALTER TABLE messages RENAME TO messages_before;"+schema+
		"INSERT INTO messages (topic, seq, time, id, sender, audience, data) SELECT topic, seq, time, id, sender, audience, data FROM messages_before ORDER BY topic, seq;"+
		"DROP TABLE messages_before")
	return err
}
