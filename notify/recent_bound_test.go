package notify

import (
	"fmt"
	"testing"
	"time"
)

// Who sends many messages with ids makes the server forget its own, and nobody else's; and
// what all make it remember is bounded.
func TestRecentIsBounded(t *testing.T) {
	r := recent{window: time.Hour, byID: map[string]*result{}, bySender: map[string][]*result{}}
	isSent := func(sender, id string) (sent bool) {
		t.Helper()
		_, err := r.do(t.Context(), sender, sender+"/"+id, func() (Report, error) {
			sent = true
			return Report{}, nil
		})
		if err != nil {
			t.Fatal(err)
		}
		return sent
	}
	isSent("ann", "first")
	isSent("", "first")
	for i := range 2 * maxRecent {
		isSent("bob", fmt.Sprint(i))
	}
	if len(r.byTime) > 4*maxRecentOfSender {
		t.Errorf("%d are kept", len(r.byTime))
	}
	for _, test := range []struct {
		sender, id string
		again      bool
	}{
		{"ann", "first", false},
		{"", "first", false},
		{"bob", fmt.Sprint(2*maxRecent - 1), false},
		{"bob", fmt.Sprint(2*maxRecent - maxRecentOfSender), false},
		{"bob", fmt.Sprint(2*maxRecent - maxRecentOfSender - 1), true},
	} {
		if again := isSent(test.sender, test.id); again != test.again {
			t.Errorf("%q of %q is sent again: %v", test.id, test.sender, again)
		}
	}
	for i := range 2 * maxRecent {
		isSent("", fmt.Sprint(i))
	}
	if len(r.byID) > maxRecent || len(r.byTime) > maxRecent || len(r.bySender) > 0 {
		t.Errorf("%d ids, %d in all, %d senders", len(r.byID), len(r.byTime), len(r.bySender))
	}
	r.forget(time.Now().Add(2 * time.Hour))
	if len(r.byID) > 0 || len(r.byTime) > 0 {
		t.Errorf("%d ids, %d in all", len(r.byID), len(r.byTime))
	}
}
