package cli

import (
	"testing"
	"time"

	"herald/hooks/internal/api"
)

// SetTokenLasts changes for how long a token of the commands is good that are made from now on, until the test ends.
func SetTokenLasts(t *testing.T, d time.Duration) {
	before := tokenLasts
	tokenLasts = d
	t.Cleanup(func() { tokenLasts = before })
}

// SubscriptionsOf lists the subscriptions of a client, as "clients" does.
func SubscriptionsOf(client api.Client) string { return subscriptionsOf(client) }
