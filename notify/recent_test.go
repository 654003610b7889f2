package notify_test

import (
	"errors"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"herald/internal/pbtest"
	"herald/notify"
)

func TestRetryIsSentOnce(t *testing.T) {
	app := pbtest.NewApp(t)
	n := notify.New(app, notify.Config{})
	client := connect(app, nil, "t")

	first, err := n.Send(t.Context(), notify.Message{Topic: "t", Data: 1, ID: "order-7"})
	if err != nil || first.ID != "order-7" || first.Queued != 1 {
		t.Fatalf("report %+v, error %v", first, err)
	}
	connect(app, nil, "t")

	var group sync.WaitGroup
	for range 20 {
		group.Go(func() {
			if report, err := n.Send(t.Context(), notify.Message{Topic: "t", Data: 1, ID: "order-7"}); err != nil || report != first {
				t.Errorf("retry: report %+v, error %v, want %+v", report, err, first)
			}
		})
		group.Go(func() {
			if report, err := n.Send(t.Context(), notify.Message{Topic: "t", Data: 1, ID: "order-8"}); err != nil || report.Queued != 2 {
				t.Errorf("report %+v, error %v", report, err)
			}
		})
	}
	group.Wait()
	if got := len(received(client)); got != 2 {
		t.Errorf("received %d messages, want one for each id", got)
	}
}

func TestFailedSendCanBeRetried(t *testing.T) {
	app := pbtest.NewApp(t)
	n := notify.New(app, notify.Config{})
	connect(app, nil, "t")
	if _, err := n.Send(t.Context(), notify.Message{Topic: "t", Data: make(chan int), ID: "x"}); !errors.Is(err, notify.ErrInvalidData) {
		t.Fatalf("error %v", err)
	}
	if report, err := n.Send(t.Context(), notify.Message{Topic: "t", Data: 1, ID: "x"}); err != nil || report.Queued != 1 {
		t.Errorf("report %+v, error %v", report, err)
	}
}

func TestInvalidID(t *testing.T) {
	n := notify.New(pbtest.NewApp(t), notify.Config{})
	for _, id := range []string{strings.Repeat("x", 256), "a\nb", "\x00"} {
		_, err := n.Send(t.Context(), notify.Message{Topic: "t", Data: 1, ID: id})
		var errs notify.Errors
		if !errors.Is(err, notify.ErrInvalidID) || !errors.As(err, &errs) || errs[0].Field != "id" {
			t.Errorf("id %q: error %v", id, err)
		}
	}
}

func TestIDIsForgottenAfterTheWindow(t *testing.T) {
	app := pbtest.NewApp(t)
	synctest.Test(t, func(t *testing.T) {
		n := notify.New(app, notify.Config{IDWindow: time.Minute})
		client := connect(app, nil, "t")
		for i, want := range []int{1, 0, 1, 0} {
			if i > 0 {
				time.Sleep(40 * time.Second)
			}
			if _, err := n.Send(t.Context(), notify.Message{Topic: "t", Data: 1, ID: "x"}); err != nil {
				t.Fatal(err)
			}
			if got := len(received(client)); got != want {
				t.Errorf("send %d: received %d, want %d", i, got, want)
			}
		}
	})
}
