package history

import (
	"context"
	"database/sql"
	"fmt"
	"testing"
)

// TestMigrateRowids opens a database of the version before messages had rowids.
func TestMigrateRowids(t *testing.T) {
	l := newTestLog(t)
	l.setKeep("a", Retention{Count: 1000})
	l.setKeep("b", Retention{Count: 1000})
	add := func(topic string, count int) (last *Entry) {
		t.Helper()
		for i := range count {
			var err error
			if last, err = l.add(topic, "", fmt.Append(nil, i)); err != nil {
				t.Fatal(err)
			}
		}
		return last
	}
	before := add("a", 30)
	add("b", 20)
	l.Close(context.Background())

	db, err := sql.Open("sqlite", l.path)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	hasRowids := func() (has bool) {
		t.Helper()
		if err := db.QueryRow("SELECT NOT wr FROM pragma_table_list('messages')").Scan(&has); err != nil {
			t.Fatal(err)
		}
		return has
	}
	if _, err := db.Exec(`ALTER TABLE messages RENAME TO m;
		CREATE TABLE messages (topic INTEGER NOT NULL, seq INTEGER NOT NULL, time INTEGER NOT NULL, id TEXT NOT NULL, sender TEXT NOT NULL,
			audience BLOB, data BLOB NOT NULL, PRIMARY KEY (topic, seq)) STRICT, WITHOUT ROWID;
		INSERT INTO messages SELECT * FROM m;
		DROP TABLE m;
		PRAGMA user_version = 1`); err != nil {
		t.Fatal(err)
	}
	if hasRowids() {
		t.Fatal("the old table has rowids")
	}

	l.restart()
	if after := add("a", 1); after.Seq != 31 || after.Epoch != before.Epoch {
		t.Errorf("after the migration: %v, before %v", after, before)
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
	if !hasRowids() {
		t.Error("the table has no rowids")
	}
}
