// Package seed gives random tests what they begin with, so that a failure can be had again.
package seed

import (
	"os"
	"strconv"
	"testing"
	"time"
)

// Of returns the seed of t, which its log names: the environment's SEED (of decimal digits), else a new one.
func Of(t testing.TB) uint64 {
	t.Helper()
	seed := uint64(time.Now().UnixNano())
	if text := os.Getenv("SEED"); text != "" {
		var err error
		if seed, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatalf("SEED: %v", err)
		}
	}
	t.Logf("SEED=%d", seed)
	return seed
}
