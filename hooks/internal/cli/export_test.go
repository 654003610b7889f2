package cli

import "time"

// SetTokenLasts changes for how long a token of the command line is good.
func SetTokenLasts(d time.Duration) { tokenLasts = d }
