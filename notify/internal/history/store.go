package history

import (
	"context"
	"crypto/rand"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

// store is the open database.
//
// A commit is on the disk when it returns (synchronous FULL, where PocketBase has NORMAL), so that
// no number is given out twice even after a power cut. One sync serves all senders of that moment.
type store struct {
	// epoch names this log. It changes when the log was lost or is an older copy of itself, because
	// then numbers that clients have seen may be given out again for other messages.
	epoch string

	// floor is the last number of every topic that has no row yet. The rows of topics without
	// messages are deleted at some point, and their numbers must not be given out again.
	floor atomic.Int64

	writeDB *sql.DB
	write   *sql.Conn // used by the leader, see line.go
	read    *sql.DB   // used by anyone

	insertTopic, insertMessage, insertID *sql.Stmt // on write
	deleteTopic                          *sql.Stmt
	deleteMessages, deleteIDs            *sql.Stmt
	saveHead, markLost                   *sql.Stmt
	markFall, saveTimes, lowerTimes      *sql.Stmt
	begin, commit, rollback              *sql.Stmt
	selectTopic, selectMessages          *sql.Stmt // on read
	selectTime, selectBefore, selectID   *sql.Stmt
	statements                           []*sql.Stmt // all of the above
}

// The tables. A topic's row stays when its messages are gone, so that its numbers continue. When
// too many such rows remain, all of them are deleted, see [store.floor].
//
// head is at least the number of the last message whose row is gone. Messages up to lost must not
// be shown, and some messages may have been sent without being stored, because the topic had no
// history for a while. Times fall if a clock was wrong: fell is the number of the last message with
// an earlier time than the message before it (0 if there is none), dipped is the first such
// message, and peak is the time before dipped. ids holds the keys of messages that came with an id.
//
// messages has rowids: without them the data would be in the tree that is searched, and SQLite reads all of a row there
// to compare its key (https://sqlite.org/withoutrowid.html, section 4). From 1,000 bytes on that takes two to three times as long.
const schema = `
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS topics (
	id   INTEGER PRIMARY KEY,
	name TEXT NOT NULL UNIQUE,
	head INTEGER NOT NULL DEFAULT 0,
	lost INTEGER NOT NULL DEFAULT -1,
	fell INTEGER NOT NULL DEFAULT 0,
	dipped INTEGER NOT NULL DEFAULT 0,
	peak INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE TABLE IF NOT EXISTS messages (
	topic    INTEGER NOT NULL,
	seq      INTEGER NOT NULL,
	time     INTEGER NOT NULL, -- Unix milliseconds
	id       TEXT NOT NULL,
	sender   TEXT NOT NULL, -- "COLLECTION_ID:RECORD_ID", or empty
	audience BLOB, -- NULL: everybody
	data     BLOB NOT NULL, -- JSON
	PRIMARY KEY (topic, seq)
) STRICT;
CREATE TABLE IF NOT EXISTS ids (
	topic INTEGER NOT NULL,
	key   TEXT NOT NULL,
	seq   INTEGER NOT NULL,
	time  INTEGER NOT NULL,
	PRIMARY KEY (topic, key)
) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS ids_seq ON ids (topic, seq);
`

const (
	metaEpoch = "epoch"
	metaFile  = "file" // the identity of the file, see fileIdentity
	// metaPending is set while a lapse is not yet recorded for all of its topics.
	metaPending = "pending"
	metaFloor   = "floor"
)

// snapshotSuffix is appended to the name of the database to name the copy for a backup.
const snapshotSuffix = ".backup"

// The write-ahead log is moved into the database every 16 MiB (wal_autocheckpoint) instead of every
// 4, because the page at the end of a topic is written many times in between.
const pragmas = "?_pragma=busy_timeout(10000)&_pragma=journal_mode(WAL)&_pragma=journal_size_limit(67108864)" +
	"&_pragma=wal_autocheckpoint(4096)&_pragma=synchronous(FULL)&_pragma=temp_store(MEMORY)"

// openStore opens or creates the database at config.Path.
func openStore(config *Config) (_ *store, err error) {
	path := config.Path
	if err := useSnapshot(path); err != nil {
		return nil, err
	}
	s := &store{}
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	if s.writeDB, err = sql.Open("sqlite", path+pragmas); err != nil {
		return nil, err
	}
	ctx := context.Background()
	if s.write, err = s.writeDB.Conn(ctx); err != nil {
		return nil, err
	}
	if _, err = s.write.ExecContext(ctx, schema); err != nil {
		return nil, err
	}
	if err = s.migrate(ctx, config); err != nil {
		return nil, err
	}
	if s.read, err = sql.Open("sqlite", path+pragmas+"&_pragma=query_only(1)"); err != nil {
		return nil, err
	}
	s.read.SetMaxOpenConns(MaxReads)
	s.read.SetMaxIdleConns(2)

	for statement, query := range map[**sql.Stmt]string{
		&s.begin:          "BEGIN IMMEDIATE",
		&s.commit:         "COMMIT",
		&s.rollback:       "ROLLBACK",
		&s.insertTopic:    "INSERT INTO topics (name, head, lost) VALUES (?, ?, ?)",
		&s.deleteTopic:    "DELETE FROM topics WHERE id = ?1 AND NOT EXISTS (SELECT 1 FROM messages WHERE topic = ?1)",
		&s.insertMessage:  "INSERT INTO messages (topic, seq, time, id, sender, audience, data) VALUES (?, ?, ?, ?, ?, ?, ?)",
		&s.insertID:       "INSERT OR REPLACE INTO ids (topic, key, seq, time) VALUES (?, ?, ?, ?)",
		&s.deleteMessages: "DELETE FROM messages WHERE topic = ? AND seq <= ?",
		&s.deleteIDs:      "DELETE FROM ids WHERE topic = ? AND seq <= ? AND (time < ? OR time > ?)",
		&s.saveHead:       "UPDATE topics SET head = max(head, ?) WHERE id = ?",
		&s.markLost:       "UPDATE topics SET head = max(head, ?1), lost = max(lost, ?1) WHERE id = ?2",
		&s.markFall:       "UPDATE topics SET fell = ?, dipped = ?, peak = ? WHERE id = ?",
		&s.saveTimes:      "UPDATE messages SET time = ? WHERE topic = ? AND seq >= ?",
		&s.lowerTimes: `UPDATE messages SET time = (SELECT time FROM messages WHERE topic = ?1 AND seq = ?2)
			WHERE topic = ?1 AND seq < ?2 AND time > (SELECT time FROM messages WHERE topic = ?1 AND seq = ?2)`,
	} {
		if *statement, err = s.write.PrepareContext(ctx, query); err != nil {
			return nil, err
		}
		s.statements = append(s.statements, *statement)
	}
	for statement, query := range map[**sql.Stmt]string{
		&s.selectTopic: selectTopics + "WHERE name = ?",
		&s.selectMessages: "SELECT seq, time, id, sender, audience, data FROM messages " +
			// the id of a row that is gone may be another topic's by now
			"WHERE topic = (SELECT id FROM topics WHERE id = ? AND name = ?) AND seq > ? ORDER BY seq LIMIT ?",
		&s.selectTime:   "SELECT time FROM messages WHERE topic = ? AND seq = ?",
		&s.selectBefore: "SELECT seq FROM messages WHERE topic = ? AND seq < ? AND time < ? ORDER BY seq DESC LIMIT 1",
		&s.selectID:     "SELECT seq FROM topics JOIN ids ON topic = topics.id WHERE name = ? AND key = ?",
	} {
		if *statement, err = s.read.PrepareContext(ctx, query); err != nil {
			return nil, err
		}
		s.statements = append(s.statements, *statement)
	}
	return s, s.readEpoch(path)
}

// MaxReads is the maximum number of concurrent reads; others wait.
const MaxReads = 4

// useSnapshot makes the copy from a restored backup the database, if the database is missing.
func useSnapshot(path string) error {
	snapshot := path + snapshotSuffix
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		if err := os.Rename(snapshot, path); !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	}
	if err := os.Remove(snapshot); !errors.Is(err, fs.ErrNotExist) {
		return err // left over from an interrupted backup
	}
	return nil
}

// readEpoch sets the epoch. It creates a new one if the database is new, comes from a backup, is a
// copy, or does not record for all topics what they have missed.
func (s *store) readEpoch(path string) error {
	ctx := context.Background()
	file := fileIdentity(path)
	known := map[string]string{}
	rows, err := s.write.QueryContext(ctx, "SELECT name, value FROM meta")
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		var name, value string
		if err := rows.Scan(&name, &value); err != nil {
			return err
		}
		known[name] = value
	}
	if err := rows.Err(); err != nil {
		return err
	}
	floor, _ := strconv.ParseInt(known[metaFloor], 10, 64) // 0 if there is none
	s.floor.Store(floor)
	if s.epoch = known[metaEpoch]; s.epoch != "" && known[metaFile] == file && known[metaPending] == "" {
		return nil
	}
	s.epoch = strings.ToLower(rand.Text()[:10])
	_, err = s.write.ExecContext(ctx, "INSERT OR REPLACE INTO meta (name, value) VALUES (?, ?), (?, ?), (?, '')",
		metaEpoch, s.epoch, metaFile, file, metaPending)
	return err
}

// setPending records whether a lapse is not yet recorded for all of its topics. After a crash,
// positions from before it are then worthless.
func (s *store) setPending(pending bool) error {
	value := ""
	if pending {
		value = "lapse"
	}
	return s.setMeta(metaPending, value)
}

func (s *store) setMeta(name, value string) error {
	_, err := s.write.ExecContext(context.Background(), "INSERT OR REPLACE INTO meta (name, value) VALUES (?, ?)", name, value)
	return err
}

func (s *store) close() error {
	var errs []error
	for _, statement := range s.statements {
		// an open statement would keep the connection open
		errs = append(errs, statement.Close())
	}
	if s.read != nil {
		errs = append(errs, s.read.Close())
	}
	if s.write != nil {
		errs = append(errs, s.write.Close())
	}
	if s.writeDB != nil {
		errs = append(errs, s.writeDB.Close())
	}
	return errors.Join(errs...)
}

// snapshot writes a copy for a backup and returns its path. The copy has no epoch, so opening it
// creates a new one. It may be called while others write.
func (s *store) snapshot(ctx context.Context, path string) (string, error) {
	snapshot := path + snapshotSuffix
	if err := os.Remove(snapshot); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	if err := execIn(ctx, path+pragmas, "VACUUM INTO ?", snapshot); err != nil {
		_ = os.Remove(snapshot)
		return "", err
	}
	return snapshot, execIn(ctx, snapshot, "DELETE FROM meta WHERE name <> '"+metaFloor+"'")
}

// execIn executes one statement in a database that it opens and closes.
func execIn(ctx context.Context, name, query string, args ...any) error {
	db, err := sql.Open("sqlite", name)
	if err != nil {
		return err
	}
	_, err = db.ExecContext(ctx, query, args...)
	return errors.Join(err, db.Close())
}

// entries returns the messages of t that follow after, at most limit, with at most maxBytes of
// data; only the last message may exceed maxBytes.
func (s *store) entries(t topicRow, after int64, limit, maxBytes int) ([]*Entry, error) {
	rows, err := s.selectMessages.Query(t.id, t.name, after, limit)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var entries []*Entry
	for size := 0; size < maxBytes && rows.Next(); {
		e := &Entry{Topic: t.name, Epoch: s.epoch}
		var sent int64
		if err := rows.Scan(&e.Seq, &sent, &e.ID, &e.Sender, &e.Audience, &e.Data); err != nil {
			return nil, err
		}
		e.Time = unixMilli(sent)
		size += len(e.Data)
		entries = append(entries, e)
	}
	return entries, rows.Err()
}

// findID returns the number of the message of the topic that came with the key, or 0.
func (s *store) findID(topic, key string) (seq int64, err error) {
	err = s.selectID.QueryRow(topic, key).Scan(&seq)
	if errors.Is(err, sql.ErrNoRows) {
		return 0, nil
	}
	return seq, err
}

// transaction calls f within a transaction, which is on the disk when transaction returns without
// an error. Only the leader may call it.
func (s *store) transaction(f func() error) error {
	_, err := s.begin.Exec()
	if err == nil {
		err = f()
	}
	if err == nil {
		_, err = s.commit.Exec()
	}
	if err != nil {
		// SQLite itself has rolled back after some errors, such as a full disk
		if _, failed := s.rollback.Exec(); failed != nil && !strings.Contains(failed.Error(), "no transaction is active") {
			err = errors.Join(err, fmt.Errorf("%w: %w", errBroken, failed))
		}
	}
	return err
}

// errBroken means that the connection can no longer be used.
var errBroken = errors.New("the transaction could not be rolled back")

// The rest must be called within a transaction.

func (s *store) addEntry(topicID int64, e *Entry) error {
	sent := e.Time.UnixMilli()
	if _, err := s.insertMessage.Exec(topicID, e.Seq, sent, e.ID, e.Sender, e.Audience, e.Data); err != nil {
		return err
	}
	if e.Key == "" {
		return nil
	}
	_, err := s.insertID.Exec(topicID, e.Key, e.Seq, sent)
	return err
}

func unixMilli(ms int64) time.Time { return time.UnixMilli(ms).UTC() }
