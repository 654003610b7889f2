// Requests to subscribe: which topics a client gets, and how it learns about those it does not get.

package hooks

import (
	"errors"
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
	"herald/notify/origin"
)

// subscribe replaces the client's subscriptions with those that it may have.
func (c connections) subscribe(e *core.RealtimeSubscribeRequestEvent) error {
	began := time.Now()
	client, isOwn := c.notifier.Own(e.Client)
	var by *notify.Replacement
	if isOwn && client.Carrier() != nil {
		if positions := origin.Resumes(e.Request.Context()); positions != nil {
			client.ResumeAt(positions)
		}
		by = &notify.Replacement{Request: e.Request, Heads: client.Heads(e.Subscriptions)} // before what is sent meanwhile
	}
	if err := c.limits.subscriptions(e); err != nil {
		return err
	}
	admission, err := c.notifier.Admit(e.Request.Context(), e.Client, e.Auth, e.Subscriptions)
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
	if by != nil {
		for _, denied := range admission.Denied {
			by.Denied = append(by.Denied, denied.Key)
		}
	}

	expires := tokenExpiry(e.RequestEvent)
	replace := func() error {
		if !origin.ResumesAs(e.Request.Context(), e.Auth) { // before anything is sent to that user
			return e.ForbiddenError("The client was somebody else.", nil)
		}
		next := func() error {
			if err := c.limits.connectionsOfUser(e); err != nil {
				return err
			}
			return e.Next()
		}
		if isOwn {
			return client.ExpectAuth(e.Auth, expires, next)
		}
		return next()
	}
	if isOwn {
		err = client.Resubscribe(admission, by, replace)
	} else {
		err = c.notifier.ResubscribeForeign(e.Client, admission, expires, replace)
	}
	if err == nil && isOwn {
		client.AnnounceDenied(admission.Denied...)
	}
	return err // ErrOvertaken is for note: to the handlers in between, the request has failed
}

// arrive gives requests to subscribe their order.
func (c connections) arrive(e *core.RequestEvent) error {
	if e.Request.Method == http.MethodPost && e.Request.URL.Path == "/api/realtime" {
		e.Request = e.Request.WithContext(c.notifier.Arrived(e.Request.Context()))
	}
	return e.Next()
}

// answerOvertaken returns err, or answers a request that a later one has overtaken: as if it had been handled first.
func answerOvertaken(e *core.RequestEvent, err error) error {
	if errors.Is(err, notify.ErrOvertaken) {
		return e.NoContent(http.StatusNoContent)
	}
	return err
}

// note lets the client, and its edge if it has one, know that a request is handled.
func (c connections) note(e *core.RealtimeSubscribeRequestEvent) error {
	err := c.notifier.NoteRequest(e.Request.Context(), e.Client, e.Auth)
	client, isOwn := c.notifier.Own(e.Client)
	switch {
	case err != nil:
	case isOwn && client.Carrier() != nil:
		err = expect(e.RequestEvent, client, func() error { return client.Carried(e.Next) })
	default:
		err = e.Next()
	}
	return answerOvertaken(e.RequestEvent, err)
}

// expect calls next once the edge that holds the client knows of the request.
func expect(e *core.RequestEvent, client *notify.Client, next func() error) error {
	expected, err := client.Carrier().Expect(e.Request)
	if err != nil {
		return e.Error(http.StatusServiceUnavailable, "The edge that holds the connection does not answer.", nil)
	}
	defer expected.Handled()
	if expected.Waited && !isStillAuth(e, client) {
		return e.ForbiddenError("The current and the previous request authorization don't match.", nil)
	}
	e.Request = expected.Request
	return next()
}

// isStillAuth reports whether the auth of a request that has waited still counts, and may be that of the client, as
// PocketBase has checked before.
func isStillAuth(e *core.RequestEvent, client *notify.Client) bool {
	if e.Auth == nil {
		return true // who the client is, is decided by signOut
	}
	now, err := e.App.FindRecordById(e.Auth.Collection().Id, e.Auth.Id)
	if err != nil || now.TokenKey() != e.Auth.TokenKey() {
		return false
	}
	user := client.User()
	return user == "" || user == notify.UserOf(e.Auth)
}

// tokenExpiry returns when the token of the request expires. It is zero if there is no such token
// or it does not expire, e.g. because the application's own middleware has set Auth.
func tokenExpiry(e *core.RequestEvent) time.Time {
	if e.Auth == nil {
		return time.Time{}
	}
	if expires, isKnown := e.Get(tokenExpiryKey).(time.Time); isKnown {
		return expires
	}
	// PocketBase has already verified the token
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

// deniedTime is the unit of how long refusing a client takes. If refusing took as long as the
// rule's query, the time would reveal what exists.
const deniedTime = 20 * time.Millisecond

// delayDenial waits until a whole number of deniedTimes has passed since began.
func delayDenial(e *core.RequestEvent, began time.Time) {
	if e.HasSuperuserAuth() {
		return
	}
	arrived(e)
	wait := deniedTime - time.Since(began)%deniedTime
	select {
	case <-time.After(wait):
	case <-e.Request.Context().Done():
	}
}

// deniedError answers a request whose new topics are all denied, or requested with wrong options.
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

// signOut signs the client out if a guest's request names the client of a user, where PocketBase
// would refuse it. So a sign-out in the SDK (authStore.clear) becomes one here. The request must
// have the client's id and come from its IP; PocketBase requires the same from guests.
func (c connections) signOut(e *core.RequestEvent) error {
	if e.Request.Method != http.MethodPost || e.Request.URL.Path != "/api/realtime" || e.Auth != nil {
		return e.Next()
	}
	var body struct {
		ClientID string `json:"clientId" form:"clientId"`
	}
	if err := e.BindBody(&body); err != nil {
		return e.Next() // which reports the error
	}
	found, err := e.App.SubscriptionsBroker().ClientById(body.ClientID)
	if err != nil {
		return e.Next()
	}
	client, ok := c.notifier.Own(found)
	if ip, _ := found.Get(apis.RealtimeClientIPKey).(string); !ok || ip != e.RealIP() {
		return e.Next()
	}
	signOut := func() error {
		tells := origin.Resumes(e.Request.Context()) == nil // otherwise, it is told when that has subscribed it again
		return answerOvertaken(e, client.SignOut(e.Request, tells, e.Next))
	}
	if client.Carrier() == nil {
		return signOut()
	}
	return expect(e, client, signOut)
}
