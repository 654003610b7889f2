package hooks_test

import (
	"archive/zip"
	"bytes"
	"database/sql"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tests"

	"herald/internal/pbtest"
	"herald/notify"
)

// TestHistoryDamaged: a file that is no database any more stops neither messages nor
// backups, and is kept.
func TestHistoryDamaged(t *testing.T) {
	t.Parallel() // it waits most of the time
	path := func(w *world) string { return filepath.Join(w.DataDir(), "notify_history.db") }
	overwrite := func(t *testing.T, w *world, from int64) {
		t.Helper()
		file, err := os.OpenFile(path(w), os.O_RDWR|os.O_CREATE, 0o644)
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		info, err := file.Stat()
		if err != nil {
			t.Fatal(err)
		}
		garbage := bytes.Repeat([]byte("garbage!"), int(max(info.Size()-from, 8192))/8)
		if _, err := file.WriteAt(garbage, from); err != nil {
			t.Fatal(err)
		}
	}
	check := func(t *testing.T, w *world, server *pbtest.Server) {
		t.Helper()
		for i := range 2 {
			if err := w.CreateBackup(t.Context(), fmt.Sprint(i, ".zip")); err != nil {
				t.Error(err)
			}
		}
		mustSend(t, w, "log/a", "new")
		page := historyOf(t, server, nil, "log/a", "", 100)
		if got := page.list(); !slices.Equal(got, []string{"1:new"}) {
			t.Errorf("got %v", got)
		}
		if kept, _ := filepath.Glob(path(w) + ".broken-*Z"); len(kept) != 1 {
			t.Errorf("kept: %v", kept)
		}
		if count := engine(w).Stats().StoreDamaged; count != 1 {
			t.Errorf("the stats tell of %d", count)
		}
		waitForLog(t, w, "The history of topics was damaged%")
	}
	t.Run("before the start", func(t *testing.T) {
		w := newWorld(t)
		w.Settings().Logs.MaxDays = 1
		addLog(t, w, 100)
		overwrite(t, w, 0)
		check(t, w, pbtest.Serve(t, w))
	})
	t.Run("without a channel that has history", func(t *testing.T) {
		w := newWorld(t)
		w.Settings().Logs.MaxDays = 1
		overwrite(t, w, 0)
		server := pbtest.Serve(t, w)
		if status, answer := server.Do(t, "POST", "/api/backups", pbtest.Token(t, w.root), map[string]any{"name": "backup.zip"}); status != http.StatusNoContent {
			t.Error(status, answer)
		}
		addLog(t, w, 100)
		check(t, w, server)
	})
	t.Run("that cannot be opened", func(t *testing.T) {
		w := newWorld(t)
		w.Settings().Logs.MaxDays = 1
		if err := os.MkdirAll(filepath.Join(path(w), "folder"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := w.CreateBackup(t.Context(), "backup.zip"); err != nil {
			t.Error(err)
		}
		waitForLog(t, w, "A backup is made without the history%")
	})
	for name, find := range map[string]func(t *testing.T, app core.App, server *pbtest.Server){
		"found by a send": func(t *testing.T, app core.App, _ *pbtest.Server) {
			if err := notify.Notify(app, "log/a", 1); !errors.Is(err, notify.ErrHistory) {
				t.Errorf("sent: %v", err)
			}
		},
		"found by a read": func(t *testing.T, app core.App, server *pbtest.Server) {
			if status, answer := server.Do(t, "GET", historyPath("log/a", "", 1000), "", nil); status != http.StatusServiceUnavailable {
				t.Errorf("%d %v", status, answer)
			}
		},
		"found by a backup": func(*testing.T, core.App, *pbtest.Server) {},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			addLog(t, w, 1000)
			pbtest.Serve(t, w)
			for range 200 {
				mustSend(t, w, "log/a", strings.Repeat("x", 1000))
			}
			engine(w).Shutdown(time.Second)
			overwrite(t, w, 8*4096) // the first pages, with the tables' names, are whole
			app := pbtest.NewAppFrom(t, pbtest.Folder(w.DataDir()))
			app.Settings().Logs.MaxDays = 1
			register(app)
			server := pbtest.Serve(t, app)
			find(t, app, server)
			check(t, &world{TestApp: app}, server)
		})
	}
}

// TestHistoryRestart: an application that is started again goes on with the same
// numbers and knows the ids of messages it had before.
func TestHistoryRestart(t *testing.T) {
	dir := t.TempDir()
	run := func(f func(app *tests.TestApp)) {
		app, err := tests.NewTestApp(dir)
		if err != nil {
			t.Fatal(err)
		}
		dir = app.DataDir() // a copy of what was in dir
		register(app)
		f(app)
	}
	var first notify.Report
	app := pbtest.NewApp(t, register)
	addLog(t, app, 10)
	pbtest.Serve(t, app)
	first = send(t, app, notify.Message{Topic: "log/a", Data: "a", ID: "m1"})
	engine(app).Shutdown(time.Second)
	dir = app.DataDir()
	run(func(app *tests.TestApp) {
		t.Cleanup(app.Cleanup)
		pbtest.Serve(t, app)
		again := send(t, app, notify.Message{Topic: "log/a", Data: "a", ID: "m1"})
		if again.Seq != first.Seq || again.ID != "m1" {
			t.Errorf("sent again: %+v, first %+v", again, first)
		}
		// the test kit has copied the folder, which makes it another log
		second := send(t, app, notify.Message{Topic: "log/a", Data: "b", ID: "m2"})
		if second.Seq != 2 || second.Epoch == first.Epoch {
			t.Errorf("second: %+v, first %+v", second, first)
		}
	})
}

// TestHistoryBackup: a backup has a copy of the history that knows it is one, and
// is made while messages go on.
func TestHistoryBackup(t *testing.T) {
	w := newWorld(t)
	if err := w.CreateBackup(t.Context(), "without.zip"); err != nil {
		t.Fatal(err)
	}
	addLog(t, w, 1000)
	server := pbtest.Serve(t, w)
	mustSendAll(t, w, "log/a", "a", "b", "c")
	stop := repeatedly(func() bool {
		mustSend(t, w, "log/b", 1)
		return true
	})
	err := w.CreateBackup(t.Context(), "with.zip")
	stop()
	if err != nil {
		t.Fatal(err)
	}
	if left, _ := filepath.Glob(filepath.Join(w.DataDir(), "*.backup")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	for name, want := range map[string][]string{"without.zip": nil, "with.zip": {"notify_history.db.backup"}} {
		archive, err := zip.OpenReader(filepath.Join(w.DataDir(), core.LocalBackupsDirName, name))
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, file := range archive.File {
			if strings.HasPrefix(file.Name, "notify_history") {
				got = append(got, file.Name)
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s has %v", name, got)
		}
		archive.Close()
	}

	// restored
	restored := t.TempDir()
	if err := unzip(filepath.Join(w.DataDir(), core.LocalBackupsDirName, "with.zip"), restored); err != nil {
		t.Fatal(err)
	}
	before := historyOf(t, server, nil, "log/a", "", 0)
	app := pbtest.NewAppFrom(t, pbtest.Folder(restored), register)
	after := historyOf(t, pbtest.Serve(t, app), nil, "log/a", "", 0)
	if !slices.Equal(after.list(), before.list()) || after.Epoch == before.Epoch || after.Epoch == "" {
		t.Errorf("restored %+v, before %+v", after, before)
	}
}

func unzip(archive, dir string) error {
	reader, err := zip.OpenReader(archive)
	if err != nil {
		return err
	}
	defer reader.Close()
	return os.CopyFS(dir, reader)
}

// holdLog makes the disk of the history slow, for as long as another process's transaction
// holds it: until release is called, or the log gives up after 10 seconds.
func holdLog(t *testing.T, app core.App) (release func()) {
	t.Helper()
	db, err := sql.Open("sqlite", filepath.Join(app.DataDir(), "notify_history.db")+"?_pragma=busy_timeout(10000)")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	db.SetMaxOpenConns(1)
	if _, err := db.Exec("BEGIN IMMEDIATE"); err != nil {
		t.Fatal(err)
	}
	return func() {
		if _, err := db.Exec("ROLLBACK"); err != nil {
			t.Error(err)
		}
	}
}

// TestSlowDisk: nobody waits for the disk of the history who does not need it.
func TestSlowDisk(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	addLog(t, w, 10)
	server := pbtest.Serve(t, w)
	other := server.Subscribe(t, nil, "other")
	last := mustSendAll(t, w, "log/a", 1, 2)

	release := holdLog(t, w)
	stored := make(chan error, 1)
	go func() { stored <- notify.Notify(w, "log/a", 3) }()

	// a message on another topic, channels that change, also what is kept, a new
	// connection, the check of rights
	for i := range 3 {
		mustSend(t, w, "other", i)
		other.Expect(t, "other", fmt.Sprint(i))
		channel := addChannel(t, w, map[string]any{"pattern": fmt.Sprintf("more%d/{x}", i), "subscribeRule": "*", "history": 5})
		channel.Set("history", 0)
		save(t, w, channel)
		channel.Set("history", 5)
		save(t, w, channel)
		server.Subscribe(t, w.ann, "other", "log/a").Close(t)
		if _, err := engine(w).Recheck(notify.RecheckFilter{}); err != nil {
			t.Fatal(err)
		}
	}
	select {
	case err := <-stored:
		t.Fatalf("the disk was not slow: %v", err)
	default:
	}
	release()
	if err := <-stored; err != nil {
		t.Fatal(err)
	}
	if p := historyOf(t, server, nil, "log/a", last.Epoch+":2", 10); len(p.Items) != 1 || !p.Complete {
		t.Errorf("page %v, complete %v", p.list(), p.Complete)
	}

	holdLog(t, w)
	go func() { stored <- notify.Notify(w, "log/a", 4) }()
	pbtest.WaitFor(t, "the message waits", func() bool { return engine(w).Stats().Messages > 0 })
	engine(w).Shutdown(100 * time.Millisecond)
	select {
	case err := <-stored:
		if !errors.Is(err, notify.ErrShutdown) { // it may have come too late
			t.Fatalf("the disk was not slow: %v", err)
		}
	default:
	}
}

// TestTriggerWaitsForNoDisk: firings to a topic with history wait for its disk, and others do not.
// Each topic keeps the order of the commits.
func TestTriggerWaitsForNoDisk(t *testing.T) {
	t.Parallel()
	w := newShop(t)
	addLog(t, w, 10)
	addTrigger(t, w, map[string]any{"name": "stored", "topic": "log/orders", "events": []string{"update"}})
	addTrigger(t, w, map[string]any{"name": "live", "events": []string{"update"}})
	mustSendAll(t, w, "log/orders", 1) // makes the file
	order := addOrder(t, w, map[string]any{"status": "new"})
	server := pbtest.Serve(t, w)
	live, stored := server.Subscribe(t, nil, "order/"+order.Id), server.Subscribe(t, nil, "log/orders")

	release := holdLog(t, w)
	for _, status := range []string{"a", "b", "c"} {
		order.Set("status", status)
		save(t, w, order)
		live.Expect(t, "order/"+order.Id, fired("update", fmt.Sprintf(`{"status":%q}`, status)))
	}
	release()
	for _, status := range []string{"a", "b", "c"} {
		stored.Expect(t, "log/orders", fired("update", fmt.Sprintf(`{"status":%q}`, status)))
	}
}
