// The engine's statistics, for people and for Prometheus.

package hooks

import (
	"crypto/subtle"
	"maps"
	"net/http"
	"strings"

	"github.com/pocketbase/pocketbase/apis"
	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/hook"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"herald/hooks/internal/triggers"
	"herald/notify"
	"herald/notify/origin"
)

// bindStats adds GET /api/notify/stats and GET /api/notify/metrics.
func bindStats(app core.App, notifier *notify.Notifier, sent *triggers.Triggers, edges *edges, version, metricsToken string) {
	registry := prometheus.NewRegistry()
	registry.MustRegister(
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		statsCollector{notifier, sent},
	)
	metrics := promhttp.HandlerFor(registry, promhttp.HandlerOpts{})

	app.OnServe().Bind(&hook.Handler[*core.ServeEvent]{
		Id: "heraldStats",
		Func: func(e *core.ServeEvent) error {
			api := e.Router.Group("/api/notify")
			api.Bind(apis.SkipSuccessActivityLog())
			api.GET("/stats", func(e *core.RequestEvent) error {
				return e.JSON(http.StatusOK, struct {
					Version string `json:"version,omitempty"`
					notify.Stats
					TriggerMessages int64         `json:"triggerMessages"` // sent by triggers so far
					TriggerFailures int64         `json:"triggerFailures"`
					Edges           []origin.Edge `json:"edges,omitempty"`
				}{version, notifier.Stats(), sent.Sent(), sent.Failed(), edges.list()})
			}).Bind(apis.RequireSuperuserAuth())
			api.GET("/metrics", apis.WrapStdHandler(metrics)).Bind(requireScraper(metricsToken))
			return e.Next()
		},
	})
}

// requireScraper lets superusers pass, and anyone with the token, if there is one.
func requireScraper(token string) *hook.Handler[*core.RequestEvent] {
	superuser := apis.RequireSuperuserAuth()
	return &hook.Handler[*core.RequestEvent]{
		Id: "heraldRequireScraper",
		Func: func(e *core.RequestEvent) error {
			if token != "" && subtle.ConstantTimeCompare([]byte(bearerToken(e)), []byte(token)) == 1 {
				return e.Next()
			}
			return superuser.Func(e)
		},
	}
}

// bearerToken returns the token of the Authorization header. Like PocketBase, it treats "Bearer "
// as optional.
func bearerToken(e *core.RequestEvent) string {
	const scheme = "Bearer "
	token := e.Request.Header.Get("Authorization")
	if len(token) > len(scheme) && strings.EqualFold(token[:len(scheme)], scheme) {
		return token[len(scheme):]
	}
	return token
}

// statsCollector provides [notify.Stats] to Prometheus.
type statsCollector struct {
	notifier *notify.Notifier
	triggers *triggers.Triggers
}

func metric(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("herald_"+name, help, labels, nil)
}

var (
	connectionsMetric    = metric("connections", "Open realtime connections.")
	takenMetric          = metric("connections_taken", "Open realtime connections that are written to without net/http.")
	subscriptionsMetric  = metric("subscriptions", "Subscriptions of connections to topics.")
	topicsMetric         = metric("topics", "Topics with subscribers.")
	usersMetric          = metric("users", "Signed-in users with a connection.")
	queuedMessagesMetric = metric("queued_messages", "Messages waiting to be written.")
	queuedBytesMetric    = metric("queued_bytes", "Bytes waiting to be written.")
	messagesMetric       = metric("messages_total", "Messages sent.")
	deliveriesMetric     = metric("deliveries_total", "Messages queued for a connection.")
	droppedMetric        = metric("dropped_total", "Deliveries lost to connections that were ended.")
	bytesMetric          = metric("written_bytes_total", "Bytes written to connections.")
	storedMetric         = metric("stored_messages_total", "Messages of topics with history that were stored.")
	storeGroupsMetric    = metric("store_transactions_total", "Transactions in which messages were stored.")
	storeFailuresMetric  = metric("store_failures_total", "Transactions of the history that failed.")
	storeDamagedMetric   = metric("store_damaged_total", "Files of the history that were damaged and set aside.")
	replayedMetric       = metric("replayed_total", "Messages queued for a connection from history.")
	triggerSentMetric    = metric("trigger_messages_total", "Messages sent by triggers.")
	triggerFailedMetric  = metric("trigger_failures_total", "Failures of triggers.")
	disconnectsMetric    = metric("disconnects_total", "Connections that ended.", "reason")
	fanOutMetric         = metric("fan_out_seconds", "How long it took to queue a message for all recipients.")
)

// Describe implements [prometheus.Collector].
func (c statsCollector) Describe(descs chan<- *prometheus.Desc) {
	prometheus.DescribeByCollect(c, descs)
}

// Collect implements [prometheus.Collector].
func (c statsCollector) Collect(metrics chan<- prometheus.Metric) {
	stats := c.notifier.Stats()
	for desc, value := range map[*prometheus.Desc]int{
		connectionsMetric:    stats.Connections,
		takenMetric:          stats.Taken,
		subscriptionsMetric:  stats.Subscriptions,
		topicsMetric:         stats.Topics,
		usersMetric:          stats.Users,
		queuedMessagesMetric: stats.QueuedMessages,
		queuedBytesMetric:    stats.QueuedBytes,
	} {
		metrics <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, float64(value))
	}
	for desc, value := range map[*prometheus.Desc]int64{
		messagesMetric:   stats.Messages,
		deliveriesMetric: stats.Deliveries,
		droppedMetric:    stats.Dropped,
		bytesMetric:      stats.Bytes,

		storedMetric:        stats.Stored,
		storeGroupsMetric:   stats.StoreGroups,
		storeFailuresMetric: stats.StoreFailures,
		storeDamagedMetric:  stats.StoreDamaged,
		replayedMetric:      stats.Replayed,

		triggerSentMetric:   c.triggers.Sent(),
		triggerFailedMetric: c.triggers.Failed(),
	} {
		metrics <- prometheus.MustNewConstMetric(desc, prometheus.CounterValue, float64(value))
	}
	ends := map[string]int64{} // a rate needs the zero before the first
	for _, why := range notify.Disconnects() {
		ends[why.Reason] = 0
	}
	maps.Copy(ends, stats.Disconnects)
	for reason, count := range ends {
		metrics <- prometheus.MustNewConstMetric(disconnectsMetric, prometheus.CounterValue, float64(count), reason)
	}
	buckets := map[float64]uint64{}
	for _, step := range stats.FanOut.Buckets {
		buckets[step.UpTo] = uint64(step.Count)
	}
	metrics <- prometheus.MustNewConstHistogram(fanOutMetric, uint64(stats.FanOut.Count), stats.FanOut.Seconds, buckets)
}
