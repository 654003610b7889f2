//go:build unix

// The two servers, each in its own process.

package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json/jsontext"
	"encoding/json/v2"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"net/http/pprof"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/pocketbase/pocketbase"
	"github.com/pocketbase/pocketbase/apis"
	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/subscriptions"
	"golang.org/x/sync/errgroup"

	"herald/hooks"
	"herald/notify"
	"herald/pb_migrations"
)

// usage is what a server has used so far.
type usage struct {
	CPU int64 `json:"cpu"` // nanoseconds
	RSS int64 `json:"rss"` // bytes

	// for the soak
	Heap       int64 `json:"heap"` // bytes in use
	Goroutines int   `json:"goroutines"`
	Files      int   `json:"files"` // open descriptors
}

func (u usage) String() string {
	return fmt.Sprintf("%d goroutines, %d descriptors, %.1f MiB heap, %.1f MiB resident",
		u.Goroutines, u.Files, float64(u.Heap)/(1<<20), float64(u.RSS)/(1<<20))
}

// serve runs "bench serve KIND ADDRESS DIR PROTOCOL [NATS]".
func serve(args []string) error {
	kind, address, dir, http2 := args[0], args[1], args[2], args[3] == "http2"
	app := pocketbase.NewWithConfig(pocketbase.Config{DefaultDataDir: dir})
	if err := app.Bootstrap(); err != nil {
		return err
	}
	send := sendSnippet
	if kind != "snippet" {
		config := hooks.Config{}
		if kind == "edges" {
			config.Origin.NATS = "embedded://" + args[4]
		}
		hooks.MustRegister(app, nil, config)
		send = sendHerald
	}

	app.OnServe().BindFunc(func(e *core.ServeEvent) error {
		e.InstallerFunc = nil
		// the same route for both, so that only the sending differs
		e.Router.POST("/bench/send", func(e *core.RequestEvent) error {
			return sendRequest(e, send)
		}).Bind(apis.SkipSuccessActivityLog())
		var token string
		if kind == "signed-in" || kind == "channels" || kind == "publish" {
			var err error
			if token, err = addUser(e.App); err != nil {
				return err
			}
		}
		if kind == "channels" {
			if err := addChannels(e.App); err != nil {
				return err
			}
		}
		switch kind {
		case "history":
			if err := addChannel(e.App, map[string]any{"history": 1000}); err != nil {
				return err
			}
		case "publish":
			if err := addChannel(e.App, map[string]any{"publishRule": memberRule}); err != nil {
				return err
			}
		}
		if kind == "crowd" || kind == "presence" || kind == "elsewhere" {
			if err := addRoom(e.App, kind == "presence", kind == "elsewhere", 0); err != nil {
				return err
			}
		}
		e.Router.POST("/bench/send-as-superuser", func(e *core.RequestEvent) error {
			return sendRequest(e, send)
		}).Bind(apis.RequireSuperuserAuth(), apis.SkipSuccessActivityLog())
		e.Router.GET("/bench/superuser", func(e *core.RequestEvent) error {
			token, err := addSuperuser(e.App)
			if err != nil {
				return err
			}
			return e.JSON(http.StatusOK, token)
		})
		e.Router.GET("/bench/room", func(e *core.RequestEvent) error { // with presence for more than by default
			if err := addRoom(e.App, true, false, 100_000); err != nil {
				return err
			}
			return e.JSON(http.StatusOK, true)
		})
		e.Router.GET("/bench/miss", func(e *core.RequestEvent) error {
			position, err := miss(e.App, e.Request.URL.Query().Get("topic"))
			if err != nil {
				return err
			}
			return e.JSON(http.StatusOK, position)
		})
		e.Router.GET("/bench/tokens", func(e *core.RequestEvent) error {
			n, err := strconv.Atoi(e.Request.URL.Query().Get("n"))
			if err != nil {
				return e.BadRequestError("", err)
			}
			tokens, err := addUsers(e.App, n)
			if err != nil {
				return err
			}
			return e.JSON(http.StatusOK, tokens)
		})
		e.Router.GET("/bench/token", func(e *core.RequestEvent) error { return e.String(http.StatusOK, token) })
		e.Router.GET("/bench/profile", func(e *core.RequestEvent) error { // like net/http/pprof, with ?seconds=5
			pprof.Profile(e.Response, e.Request)
			return nil
		})
		e.Router.GET("/bench/usage", func(e *core.RequestEvent) error {
			if e.Request.URL.Query().Has("free") {
				debug.FreeOSMemory() // so that only memory in use counts, without garbage from connecting
			}
			used, err := readUsage()
			if err != nil {
				return err
			}
			return e.JSON(http.StatusOK, used)
		}).Bind(apis.SkipSuccessActivityLog())
		if http2 {
			certificate, err := selfSigned()
			if err != nil {
				return err
			}
			e.Server.TLSConfig.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return certificate, nil }
		}
		return e.Next()
	})
	config := apis.ServeConfig{HttpAddr: address}
	if http2 {
		config = apis.ServeConfig{HttpsAddr: address}
	}
	return apis.Serve(app, config)
}

func sendRequest(e *core.RequestEvent, send func(core.App, string, jsontext.Value) error) error {
	var body struct {
		Topic string         `json:"topic"`
		Data  jsontext.Value `json:"data"`
	}
	if err := json.UnmarshalRead(e.Request.Body, &body); err != nil {
		return e.BadRequestError("", err)
	}
	if err := send(e.App, body.Topic, body.Data); err != nil {
		return err
	}
	return e.NoContent(http.StatusNoContent)
}

// addSuperuser adds a superuser and returns their token.
func addSuperuser(app core.App) (token string, err error) {
	superusers, err := app.FindCollectionByNameOrId(core.CollectionNameSuperusers)
	if err != nil {
		return "", err
	}
	superuser := core.NewRecord(superusers)
	superuser.SetEmail("root@example.com")
	superuser.SetRandomPassword()
	if err := app.Save(superuser); err != nil {
		return "", err
	}
	return superuser.NewAuthToken()
}

// memberRule is a rule that looks at a record.
const memberRule = `@request.auth.id != "" && @collection.users.id ?= @request.auth.id`

// miss adds a channel with a rule and history, of which topic is one, and sends ten messages. It
// returns the position before them.
func miss(app core.App, topic string) (position string, err error) {
	channels, err := app.FindCollectionByNameOrId(pb_migrations.ChannelsCollectionID)
	if err != nil {
		return "", err
	}
	channel := core.NewRecord(channels)
	channel.Load(map[string]any{
		"pattern": "members/{room}", "history": 1000, "subscribeRule": memberRule,
	})
	if err := app.Save(channel); err != nil {
		return "", err
	}
	for i := range 11 {
		report, err := notify.New(app, notify.Config{}).Send(context.Background(), notify.Message{Topic: topic, Data: i})
		if err != nil {
			return "", err
		}
		if i == 0 {
			position = fmt.Sprintf("%s:%d", report.Epoch, report.Seq)
		}
	}
	return position, nil
}

// addUser adds a user and returns their token.
func addUser(app core.App) (token string, err error) {
	users, err := app.FindCollectionByNameOrId("users")
	if err != nil {
		return "", err
	}
	user := core.NewRecord(users)
	user.SetEmail("bench@example.com")
	user.SetRandomPassword()
	if err := app.Save(user); err != nil {
		return "", err
	}
	return user.NewAuthToken()
}

// addChannels adds 100 channels that let users in, one of them for the measured topic.
func addChannels(app core.App) error {
	channels, err := app.FindCollectionByNameOrId(pb_migrations.ChannelsCollectionID)
	if err != nil {
		return err
	}
	for i := range 100 {
		channel := core.NewRecord(channels)
		channel.Set("pattern", fmt.Sprintf("topic%d/{id}", i))
		if i == 0 {
			channel.Set("pattern", "{bench}")
		}
		channel.Set("subscribeRule", `@request.auth.id != ""`)
		if err := app.Save(channel); err != nil {
			return err
		}
	}
	return nil
}

// addUsers adds n users and returns their tokens.
func addUsers(app core.App, n int) (tokens []string, err error) {
	users, err := app.FindCollectionByNameOrId("users")
	if err != nil {
		return nil, err
	}
	users.Fields.GetByName(core.FieldNamePassword).(*core.PasswordField).Cost = 4 // else it takes minutes
	if err := app.Save(users); err != nil {
		return nil, err
	}
	return tokens, app.RunInTransaction(func(tx core.App) error {
		for i := range n {
			user := core.NewRecord(users)
			user.SetEmail(fmt.Sprintf("bench%d@example.com", i))
			user.Set("name", fmt.Sprintf("User %d", i))
			user.SetRandomPassword()
			if err := tx.Save(user); err != nil {
				return err
			}
			token, err := user.NewAuthToken()
			if err != nil {
				return err
			}
			tokens = append(tokens, token)
		}
		return nil
	})
}

// addRoom adds the channel of the room and others, unless there are some from before a restart. The
// room has presence or another channel has. limit is the presenceLimit, 0 the default.
func addRoom(app core.App, here, elsewhere bool, limit int) error {
	channels, err := app.FindCollectionByNameOrId(pb_migrations.ChannelsCollectionID)
	if err != nil {
		return err
	}
	if known, err := app.CountRecords(channels.Id); err != nil || known > 0 {
		return err
	}
	for pattern, hasPresence := range map[string]bool{"room/{room}": here, "bench": false, "elsewhere": elsewhere} {
		channel := core.NewRecord(channels)
		channel.Load(map[string]any{
			"pattern": pattern, "subscribeRule": "*", "presence": hasPresence, "presenceRule": "*", "presenceFields": "name", "presenceLimit": limit,
		})
		if err := app.Save(channel); err != nil {
			return err
		}
	}
	return nil
}

// addChannel adds a channel for the measured topic.
func addChannel(app core.App, values map[string]any) error {
	channels, err := app.FindCollectionByNameOrId(pb_migrations.ChannelsCollectionID)
	if err != nil {
		return err
	}
	channel := core.NewRecord(channels)
	channel.Load(map[string]any{"pattern": "{bench}", "subscribeRule": "*"})
	channel.Load(values)
	return app.Save(channel)
}

func sendHerald(app core.App, topic string, data jsontext.Value) error {
	return notify.Notify(app, topic, data)
}

// sendSnippet does what PocketBase's documentation suggests ("Realtime messaging").
func sendSnippet(app core.App, topic string, data jsontext.Value) error {
	raw, err := json.Marshal(data)
	if err != nil {
		return err
	}
	message := subscriptions.Message{Name: topic, Data: raw}
	group := new(errgroup.Group)
	for _, chunk := range app.SubscriptionsBroker().ChunkedClients(300) {
		group.Go(func() error {
			for _, client := range chunk {
				if client.HasSubscription(topic) {
					client.Send(message)
				}
			}
			return nil
		})
	}
	return group.Wait()
}

func readUsage() (usage, error) {
	var r syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &r); err != nil {
		return usage{}, err
	}
	statm, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return usage{}, err
	}
	pages, err := strconv.ParseInt(strings.Fields(string(statm))[1], 10, 64)
	if err != nil {
		return usage{}, err
	}
	files, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return usage{}, err
	}
	var memory runtime.MemStats
	runtime.ReadMemStats(&memory)
	return usage{
		CPU:        r.Utime.Nano() + r.Stime.Nano(),
		RSS:        pages * int64(os.Getpagesize()),
		Heap:       int64(memory.HeapAlloc),
		Goroutines: runtime.NumGoroutine(),
		Files:      len(files),
	}, nil
}

func selfSigned() (*tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		NotAfter:     time.Now().Add(24 * time.Hour),
		IPAddresses:  []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return nil, err
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, nil
}
