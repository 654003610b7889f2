// Requests to subscribe: which of the topics a client gets, and how it hears of
// those that it does not.

package hooks

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	validation "github.com/pocketbase/ozzo-validation/v4"
	"github.com/pocketbase/pocketbase/apis"
	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/security"

	"herald/notify"
)

// subscribe replaces the client's subscriptions by those that it may have.
func (c connections) subscribe(e *core.RealtimeSubscribeRequestEvent) error {
	began := time.Now()
	if err := c.limits.subscriptions(e); err != nil {
		return err
	}
	admission, err := c.notifier.Admit(e.Client, e.Auth, e.Subscriptions)
	if err != nil {
		return e.InternalServerError("Failed to check the subscriptions.", err)
	}
	if len(admission.Denied) > 0 {
		delayDenial(e.RequestEvent, began)
	}
	if admission.Refused {
		return deniedError(e, admission.Denied)
	}
	e.Subscriptions = admission.Keys

	expires := tokenExpiry(e.RequestEvent)
	replace := func() error {
		if err := c.limits.connectionsOfUser(e); err != nil {
			return err
		}
		return e.Next()
	}
	client, ok := c.notifier.Own(e.Client)
	if !ok {
		return c.notifier.ResubscribeForeign(e.Client, admission, expires, replace)
	}
	client.SetExpiry(expires) // before anything is sent to that user
	err = client.Resubscribe(admission, replace)
	if err == nil {
		client.AnnounceDenied(admission.Denied...)
	}
	return err
}

// tokenExpiry returns when the token of the request expires; zero where it has
// none that does, e.g. since a middleware of the application's own has set Auth.
func tokenExpiry(e *core.RequestEvent) time.Time {
	if e.Auth == nil {
		return time.Time{}
	}
	// PocketBase has verified it
	claims, err := security.ParseUnverifiedJWT(bearerToken(e))
	if err != nil {
		return time.Time{}
	}
	expires, err := claims.GetExpirationTime()
	if err != nil || expires == nil {
		return time.Time{}
	}
	return expires.Time
}

// deniedTime is the unit of how long the refusal of a client takes: were it as
// long as the rule's query, the time would tell what there is.
const deniedTime = 20 * time.Millisecond

// delayDenial waits until a whole number of deniedTimes has passed since the
// request began to be looked at.
func delayDenial(e *core.RequestEvent, began time.Time) {
	if e.HasSuperuserAuth() {
		return
	}
	wait := deniedTime - time.Since(began)%deniedTime
	select {
	case <-time.After(wait):
	case <-e.Request.Context().Done():
	}
}

// deniedError answers a request of which every new topic is denied, or asked for
// with options that are wrong.
func deniedError(e *core.RealtimeSubscribeRequestEvent, denied []notify.Denial) error {
	data := validation.Errors{}
	var forbidden []string
	for _, d := range denied {
		code := "validation_invalid_position"
		if d.Status == http.StatusForbidden {
			code = "validation_topic_forbidden"
			topic, _, _ := strings.Cut(d.Key, "?")
			forbidden = append(forbidden, fmt.Sprintf("%q", topic))
		}
		data[fmt.Sprint(slices.Index(e.Subscriptions, d.Key))] = validation.NewError(code, d.Message)
	}
	data = validation.Errors{"subscriptions": data}
	if len(forbidden) == 0 {
		return e.BadRequestError("The options of the subscription are wrong.", data)
	}
	return e.ForbiddenError("You are not allowed to listen to "+strings.Join(forbidden, ", ")+".", data)
}

// signOut makes a guest's request for the client of a user sign the client out,
// where PocketBase would refuse it: what is a sign-out in the SDK (authStore.clear)
// then is one here. That the request has the client's id and comes from its IP,
// PocketBase asks of guests too.
func (c connections) signOut(e *core.RequestEvent) error {
	if e.Request.Method != http.MethodPost || e.Request.URL.Path != "/api/realtime" || e.Auth != nil {
		return e.Next()
	}
	var body struct {
		ClientID string `json:"clientId" form:"clientId"`
	}
	if err := e.BindBody(&body); err != nil {
		return e.Next() // which says so
	}
	found, err := e.App.SubscriptionsBroker().ClientById(body.ClientID)
	if err != nil {
		return e.Next()
	}
	client, ok := c.notifier.Own(found)
	if ip, _ := found.Get(apis.RealtimeClientIPKey).(string); ok && ip == e.RealIP() && client.Get(apis.RealtimeClientAuthKey) != nil {
		return client.SignOut(e.Next)
	}
	return e.Next()
}
