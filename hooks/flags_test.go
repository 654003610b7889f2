package hooks_test

import (
	"strings"
	"testing"

	"github.com/spf13/pflag"

	"herald/hooks"
)

// TestFlags: numbers that make no sense are refused at the start.
func TestFlags(t *testing.T) {
	for _, test := range []struct{ flag, value, want string }{
		{"notifyMaxConnections", "-1", "at least 0"},
		{"notifyMaxSubscriptions", "many", "must be a number"},
		{"notifyQueueSize", "0", "at least 1"},
		{"notifyMaxSize", "-5", "at least 1"},
		{"notifyMaxMeta", "9999", "at most 4096"},
		{"notifyMaxMeta", "4096", ""},
		{"notifyHeartbeat", "-1s", "must be a duration"},
		{"notifyMaxConnectionsPerIP", "0", ""},
		{"notifyQueueBytes", "1048576", ""},
	} {
		var config hooks.Config
		flags := pflag.NewFlagSet("test", pflag.ContinueOnError)
		config.BindFlags(flags)
		err := flags.Parse([]string{"--" + test.flag + "=" + test.value})
		if (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
			t.Errorf("--%s=%s: error %v", test.flag, test.value, err)
		}
	}
	var config hooks.Config
	flags := pflag.NewFlagSet("test", pflag.ContinueOnError)
	config.BindFlags(flags)
	if err := flags.Parse([]string{"--notifyQueueSize=7"}); err != nil || config.Notify.QueueSize != 7 || config.Notify.MaxSize == 0 {
		t.Errorf("%+v, error %v", config.Notify, err)
	}
}
