package cli

import (
	"time"

	"herald/hooks/internal/api"
)

// SetTokenLasts changes for how long a token of the command line is good.
func SetTokenLasts(d time.Duration) { tokenLasts = d }

// SubscriptionsOf lists the subscriptions of a client, as "clients" does.
func SubscriptionsOf(client api.Client) string { return subscriptionsOf(client) }
