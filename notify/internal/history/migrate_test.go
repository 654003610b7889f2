package history

import (
	"context"
	"database/sql"
	"fmt"
	"log/slog"
	"os"
	"testing"
)

// newOldLog returns a log that has 30 messages of topic a and 20 of b in the format from before messages had rowids, the
// last one of a, and whether there are rowids.
func newOldLog(t *testing.T) (l *testLog, last *Entry, hasRowids func() bool) {
	t.Helper()
	l = newTestLog(t)
	for topic, count := range map[string]int{"b": 20, "a": 30} {
		l.setKeep(topic, Retention{Count: 1000})
		for i := range count {
			entry, err := l.add(topic, "", fmt.Append(nil, i))
			if err != nil {
				t.Fatal(err)
			}
			if topic == "a" {
				last = entry
			}
		}
	}
	l.Close(context.Background())

	db, err := sql.Open("sqlite", l.path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	if _, err := db.Exec(`ALTER TABLE messages RENAME TO m;
		CREATE TABLE messages (topic INTEGER NOT NULL, seq INTEGER NOT NULL, time INTEGER NOT NULL, id TEXT NOT NULL, sender TEXT NOT NULL,
			audience BLOB, data BLOB NOT NULL, PRIMARY KEY (topic, seq)) STRICT, WITHOUT ROWID;
		INSERT INTO messages SELECT * FROM m;
		DROP TABLE m;
		VACUUM;
		PRAGMA user_version = 1`); err != nil {
		t.Fatal(err)
	}
	hasRowids = func() (has bool) {
		t.Helper()
		if err := db.QueryRow("SELECT NOT wr FROM pragma_table_list('messages')").Scan(&has); err != nil {
			t.Fatal(err)
		}
		return has
	}
	if hasRowids() {
		t.Fatal("the old table has rowids")
	}
	return l, last, hasRowids
}

// expectOld adds a message to topic a behind last, and expects those of newOldLog before it.
func (l *testLog) expectOld(t *testing.T, last *Entry) {
	t.Helper()
	if after, err := l.add("a", "", []byte("30")); err != nil || after.Seq != 31 || after.Epoch != last.Epoch {
		t.Errorf("after the migration: %v %v, before %v", after, err, last)
	}
	for topic, count := range map[string]int{"a": 31, "b": 20} {
		page, err := l.Read(topic, Start{}, 100, maxBytes)
		if err != nil || !page.Complete || len(page.Entries) != count {
			t.Fatalf("%s: %v %v", topic, page, err)
		}
		for i, entry := range page.Entries[:20] {
			if string(entry.Data) != fmt.Sprint(i) || entry.Seq != int64(i+1) {
				t.Errorf("got %v", entry)
			}
		}
	}
}

// TestMigrateRowids opens a database of the version before messages had rowids.
func TestMigrateRowids(t *testing.T) {
	l, before, hasRowids := newOldLog(t)
	l.restart()
	l.expectOld(t, before)
	if !hasRowids() {
		t.Error("the table has no rowids")
	}
}

// TestMigrateFullDisk: where there is no room for a copy, the history goes on in the older format, and is converted later.
func TestMigrateFullDisk(t *testing.T) {
	l, before, hasRowids := newOldLog(t)
	ctx := context.Background()
	s := &store{}
	var err error
	if s.writeDB, err = sql.Open("sqlite", l.path+pragmas+"&_pragma=cache_size(10)"); err != nil { // so that it is written early
		t.Fatal(err)
	}
	if s.write, err = s.writeDB.Conn(ctx); err != nil {
		t.Fatal(err)
	}
	var pages int
	if _, err := s.write.ExecContext(ctx, `INSERT INTO topics (name) VALUES ('large');
		WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i < 1000)
		INSERT INTO messages SELECT topics.id, i, 0, '', '', NULL, randomblob(1000) FROM n, topics WHERE topics.name = 'large'`); err != nil {
		t.Fatal(err)
	}
	if err := s.write.QueryRowContext(ctx, "PRAGMA page_count").Scan(&pages); err != nil {
		t.Fatal(err)
	}
	if err := s.write.QueryRowContext(ctx, fmt.Sprintf("PRAGMA max_page_count = %d", pages+100)).Scan(&pages); err != nil { // less than a copy needs
		t.Fatal(err)
	}
	var warned counted
	if err := s.migrate(ctx, &Config{Path: l.path, Logger: func() *slog.Logger { return slog.New(&warned) }}); err != nil {
		t.Fatal(err)
	}
	if hasRowids() || warned.count != 1 {
		t.Errorf("rowids: %v, warnings: %d", hasRowids(), warned.count)
	}
	if info, err := os.Stat(l.path + "-wal"); err != nil || info.Size() > 0 {
		t.Errorf("the log keeps its room: %v %v", info.Size(), err)
	}
	if _, err := s.write.ExecContext(ctx, "PRAGMA max_page_count = 1000000; BEGIN; INSERT INTO messages VALUES (0, 0, 0, '', '', NULL, X''); ROLLBACK"); err != nil {
		t.Errorf("after it has failed: %v", err)
	}
	s.close()

	l.restart()
	l.expectOld(t, before)
	if !hasRowids() {
		t.Error("the table has no rowids")
	}
}

// counted is a [slog.Handler] that counts warnings.
type counted struct{ count int }

func (*counted) Enabled(context.Context, slog.Level) bool { return true }
func (c *counted) Handle(_ context.Context, r slog.Record) error {
	if r.Level == slog.LevelWarn {
		c.count++
	}
	return nil
}
func (c *counted) WithAttrs([]slog.Attr) slog.Handler { return c }
func (c *counted) WithGroup(string) slog.Handler      { return c }
