// Subscriptions that lose nothing, over the stock PocketBase SDK.
//
//   import { subscribe } from "/herald.js";
//   const unsubscribe = await subscribe(pb, "chat/42", ({ data, from }) => show(from, data));
//
// On a topic whose channel has history, each message reaches the callback once and
// in order, whatever happens to the connection meanwhile. How:
//
//   - The position in the topic's history is that of the last message that the
//     callback got.
//   - When the SDK has subscribed (again), and when the tab or the network comes
//     back, the messages behind the position are fetched. Those that arrive by the
//     connection meanwhile wait, and are delivered where they are newer.
//   - A message counts as live only on the connection on which that was done: within
//     one connection the server leaves nothing out.
//   - The server beats: it sends a small event on @beat now and then. A connection on
//     which two are overdue is dead, whatever the browser thinks of it.
//   - Nothing between the client and the server is trusted. Only an answer that has the
//     form of Herald's counts; any other one (cut, HTML, a proxy's 404) is a failure
//     that is tried again, like a broken connection.
//   - Who is signed in is what the token says. The device's clock is never asked.

const pageSize = 500;
const maxPages = 100; // that the server answers with at once
const maxWaiting = 1000; // messages; more can be fetched
const kickAfter = 3000; // ms
const watchEvery = 5000; // ms
const submitWithin = 15000; // ms
const firstBeatWithin = 5000; // ms
const submitEvery = 1000; // ms
const openTries = 5;
const firstStateWithin = 10000; // ms
const reloadWithin = 3; // s
const backWithin = 10000; // ms; the server waits as long for a lost connection to come back
const maxClientIds = 20; // that the server looks at

const check = (pb, topic, callback, options, known) => {
  const { since, rewind } = options;
  const unknown = Object.keys(options).find((name) => !known.includes(name));
  if (unknown !== undefined) throw new TypeError(`herald.js: there is no option ${unknown}`);
  for (const name of ["visible", "join"]) {
    if (![undefined, true, false].includes(options[name])) throw new TypeError(`herald.js: ${name} must be true or false`);
  }
  if (typeof topic !== "string" || topic === "") throw new TypeError("herald.js: the topic must be a text");
  if (typeof callback !== "function") throw new TypeError("herald.js: the callback must be a function");
  if (since && rewind !== undefined) throw new TypeError("herald.js: since and rewind exclude each other");
  if (since && !/^.+:\d+$/.test(since)) throw new TypeError("herald.js: since must be a position, as onState and each message have it");
  if (!(pb?.realtime?.subscribe?.length >= 3)) { // older ones take no options
    throw new Error("herald.js needs PocketBase's JavaScript SDK 0.21 or newer");
  }
};

/** See herald.d.ts. */
export async function subscribe(pb, topic, callback, options = {}) {
  check(pb, topic, callback, options, ["since", "rewind", "onGap", "onState"]);
  const subscription = new Subscription(hubOf(pb), topic, callback, options);
  await subscription.open();
  return () => subscription.close();
}

/** See herald.d.ts. */
export async function presence(pb, topic, options = {}) {
  check(pb, topic, () => {}, options, ["meta", "visible", "join", "onChange", "onCount", "onState"]);
  const watch = new Watch(hubOf(pb), topic, options);
  await watch.open();
  return watch.members;
}

class Subscription {
  constructor(hub, topic, callback, options) {
    this._epoch = ""; // with _seq the position; empty: not known
    this._seq = 0;
    this._state = "";
    this._connection = ""; // the client id of the connection on which it is subscribed
    this._asked = false; // the SDK knows of it
    this._waiting = []; // live messages that came before their turn
    this._dropped = false; // some of these were too many
    this._doubts = 0; // how often it was denied since it was live
    this._lastLive = 0; // highest number that came by the connection
    this._recovering = false;
    this._again = false; // something happened while it was
    this._wake = () => {};
    this._hub = hub;
    this.topic = topic;
    this._key = new Key(hub.pb, topic, { envelope: true });
    this._callback = callback;
    this._options = options;
  }

  get _closed() {
    return this._state === "closed";
  }

  /** The server does not let it listen. */
  get isDenied() {
    return this._state === "denied";
  }

  get position() {
    return this._epoch && `${this._epoch}:${this._seq}`;
  }

  async open() {
    const { since, rewind } = this._options;
    this._setState("connecting");
    try {
      // Where it begins is settled before it is subscribed: what is sent in between is
      // fetched.
      if (since) {
        this._moveTo(since);
      } else if (rewind !== undefined) {
        this._take(await this._fetchForOne({ rewind }));
      } else {
        const { epoch, head } = await this._persist(() => this._fetch({ limit: 1 }));
        this._moveTo(`${epoch}:${head}`);
      }
      await this._persist(() => this._hub.add(this));
      const before = this._hub.connection;
      await this._persist(() => {
        this._asked = true;
        return this._key.subscribe((message) => this._receive(message));
      });
      // else the SDK is about to connect, and PB_CONNECT comes after it has subscribed
      if (before && before === this._hub.connection) this._connection = before;
    } catch (error) {
      await this.close();
      throw error;
    }
    this.recover();
  }

  _persist(f) {
    return persist(f, () => this._closed, (ms) => {
      this._asked = false;
      return this._pause(ms);
    });
  }

  /** Never rejects: the SDK has forgotten the subscription even where it could not tell
   * the server, which hears of it with the next one. */
  async close() {
    if (this._closed) return;
    this._setState("closed");
    this._waiting = [];
    this._wake();
    if (this._asked) await this._key.unsubscribe().catch(() => {});
    await this._hub.remove(this);
  }

  /** The application has unsubscribed it with the SDK's own calls. */
  get isForgotten() {
    return !this._closed && this._key.isForgotten;
  }

  /** Somebody else signs in: what is under way is for the one before. */
  userChanged() {
    this._waiting = [];
    this.disconnected();
    this._again = true;
  }

  /** The SDK has subscribed to all topics, on a new connection or anew. */
  connected(id) {
    if (!this._asked) return;
    if (this.isDenied) this._setState("connecting");
    this._connection = id;
    this._lastLive = 0;
    this._wake();
    this.recover();
  }

  disconnected() {
    this._connection = "";
    if (!this._closed && !this.isDenied) this._setState("connecting");
  }

  /** The server says that it has ended or refused the subscription. By the time that
   * arrives it may be allowed again. */
  async askAgain() {
    if (this._closed || this.isDenied) return;
    this._connection = "";
    const { user } = this._hub;
    try {
      await this._fetch({ limit: 1 });
    } catch (error) {
      if (isRefusal(error) && user === this._hub.user) return this._denied();
    }
    this._hub.subscribeAfter(this._doubts++);
  }

  _denied() {
    this._connection = "";
    this._waiting = [];
    this._setState("denied");
    this._wake();
  }

  /** The tab or the network is back: the connection may be dead without knowing. */
  async wake() {
    if (this._closed || this.isDenied) return;
    const { position } = this;
    const connection = this._connection;
    this._wake();
    await this.recover();
    const fetched = this._seq;
    if (!connection || this.position === position) return;
    setTimeout(() => {
      // what was fetched should have come by the connection, too
      if (!this._closed && this._connection === connection && this._lastLive < fetched) this._hub.kick(connection);
    }, kickAfter);
  }

  /** Fetches what was missed, and goes live where the connection is up. Never rejects. */
  async recover() {
    this._again = true;
    if (this._recovering || this._closed) return;
    this._recovering = true;
    try {
      await this._recover();
    } catch (error) {
      console.error(error);
    } finally {
      this._recovering = false;
    }
  }

  async _recover() {
    let doubted = ""; // the connection that the server does not know to be subscribed
    for (let failures = 0, doubts = 0; !this._closed; ) {
      this._setState("recovering");
      this._again = this._dropped = false;
      const connection = this._connection;
      const { user } = this._hub;
      let page;
      try {
        page = await this._fetch({ since: this.position, subscription: connection && this._key.sentName }, failures);
        failures = 0;
      } catch (error) {
        if (this._isOver) return;
        if (user !== this._hub.user) continue; // that was the answer to somebody else
        if (isRefusal(error)) {
          if (this._again && connection !== this._connection) continue; // signed in meanwhile
          return this._denied();
        }
        await this._pause(backoff(failures++));
        if (this._isOver) return;
        continue;
      }
      if (this._isOver) return;
      if (user !== this._hub.user) continue;
      this._take(page);
      if (this._isOver) return;
      if (page.epoch && page.next !== `${page.epoch}:${page.head}`) continue;
      if (this._again || this._dropped) continue;
      if (!connection || connection !== this._hub.pb.realtime.clientId) {
        this._setState("connecting"); // PB_CONNECT comes, and with it recover
        return;
      }
      if (page.subscribed === false) {
        // The SDK says so where another request has replaced its own, which is under way, and where a proxy has answered.
        if (doubted !== connection) doubts = 0;
        doubted = connection;
        if (doubts > 0) this._hub.submitAgain();
        await this._pause(backoff(doubts++));
        if (this._isOver) return;
        continue;
      }
      this._setState("live");
      this._doubts = 0;
      for (const message of this._waiting.splice(0)) this._receive(message);
      if (!this._again) return;
    }
  }

  /** There is nothing to recover: it was closed, or denied and nothing came after. */
  get _isOver() {
    return this._closed || (this.isDenied && !this._again);
  }

  /** A page of one user: another may sign in before it comes. */
  async _fetchForOne(query) {
    for (const { authStore } = this._hub.pb; ; ) {
      const user = userOf(authStore);
      const page = await this._persist(() => this._fetch(query));
      if (user === userOf(authStore)) return page;
    }
  }

  async _fetch(query, failures = 0) {
    const known = Object.fromEntries(Object.entries(query).filter(([, value]) => value !== "" && value !== undefined));
    const page = await this._hub.page({ topic: this.topic, limit: pageSize, ...known }, failures);
    if (!isPage(page, this.topic)) throw new Error("the answer is none of Herald's");
    this._hub.expectBeats(page.beat);
    return page;
  }

  /** Delivers the messages of a page. */
  _take(page) {
    const since = this.position;
    if (!page.complete || (since && !page.epoch)) {
      this._call(this._options.onGap, { topic: this.topic, since, epoch: page.epoch, first: page.items[0]?.seq ?? null, head: page.head });
    }
    if (page.epoch !== this._epoch || page.head < this._seq) {
      this._epoch = page.epoch;
      this._seq = 0;
    }
    for (const message of page.items) this._deliver(message, true);
    if (page.next) this._seq = Math.max(this._seq, numberOf(page.next));
  }

  /** Takes a message that came by the connection. */
  _receive(message) {
    if (this._closed || this.isDenied || !isMessage(message, this.topic)) return;
    this._lastLive = Math.max(this._lastLive, message.seq);
    const isLive = this._state === "live" && this._connection === this._hub.pb.realtime.clientId;
    if (isLive && message.epoch === this._epoch) {
      this._deliver(message, false);
      return;
    }
    if (this._waiting.length === maxWaiting) {
      this._waiting = [];
      this._dropped = true;
    }
    this._waiting.push(message);
    if (isLive) this.recover(); // another history, or none any more
  }

  _deliver(message, replayed) {
    if (this._closed || (message.epoch && message.seq <= this._seq)) return;
    if (message.epoch) this._seq = message.seq;
    this._call(this._callback, { ...message, replayed, position: this.position });
  }

  _moveTo(position) {
    this._epoch = position.slice(0, position.lastIndexOf(":"));
    this._seq = numberOf(position);
  }

  _setState(state) {
    if (state === this._state || this._closed) return;
    this._state = state;
    this._call(this._options.onState, state, this.position);
  }

  _call(f, ...args) {
    try {
      f?.(...args);
    } catch (error) {
      console.error(error); // the next message is not to suffer for it
    }
  }

  _pause(ms) {
    return new Promise((resolve) => {
      const timer = setTimeout(resolve, ms);
      this._wake = () => {
        clearTimeout(timer);
        resolve();
      };
    });
  }
}

// Who is present on a topic, and what this client shows of its user. The members that
// were known stay until a new state is whole, unless somebody else signs in.
class Watch {
  constructor(hub, topic, options) {
    this.members = new Presence(this);
    this._joined = null; // the key by which the user is present; null: it only watches
    this._epoch = "";
    this._seq = 0;
    this._state = ""; // "connecting", "live", "denied", "closed"
    this._isOpen = false; // the application has its members, and its callbacks are called
    this._begun = () => {}; // resolves what open waits for
    this._doubts = 0; // how often it was denied since it was live
    this._stateOn = ""; // the client id of the connection that the last state or count came by
    this._loading = 0; // counts states; a page of an earlier one is dropped
    this._next = undefined; // while a state is being loaded: the members so far, and the number of the last diff about each
    this._counts = { total: 0, guests: 0 }; // as the server says
    this._awaited = new Set(); // members of before a restart of the server that may not have come back yet
    this._settling = undefined; // the timer
    this._asked = false;
    this._shown = {}; // what the server has accepted: meta, visible
    this._shownFor = ""; // the user that this is about
    this._wanted = {}; // changes that it has not
    this._waiters = []; // who waits for these
    this._renews = false; // it is to hear that the user is still here
    this._sending = false;
    this._nameless = ""; // a connection that the server does not take for this user's
    this._renewal = undefined; // the timer
    this._undo = [];
    this._hub = hub;
    this._target = topic;
    this.topic = `@presence/${topic}`;
    this._options = options;
    this._key = new Key(hub.pb, this.topic, {}); // of what the server tells
    if (options.join !== false) this._joined = this._newJoin(options.visible !== false);
    this._setState("connecting");
  }

  /** The SDK asks for the key again on each new connection, so a hidden user is never seen. */
  _newJoin(isVisible) {
    return Object.assign(new Key(this._hub.pb, this._target, isVisible ? {} : { visible: false }), { isVisible });
  }

  get isDenied() {
    return this._state === "denied";
  }

  get _closed() {
    return this._state === "closed";
  }

  get isForgotten() {
    return !this._closed && (this._key.isForgotten || (this._joined?.isForgotten ?? false));
  }

  /** Whether it makes its user present on a topic. */
  joins(topic) {
    return !this._closed && this._joined !== null && this._target === topic;
  }

  async open() {
    const { meta, visible } = this._options;
    const first = { ...(meta !== undefined && { meta }), ...(visible === false && { visible }) };
    try {
      if (Object.keys(first).length > 0) { // before anybody sees the user without it
        await this._persist(() => this._put(first));
        this._shown = first;
        this._shownFor = userOf(this._hub.pb.authStore);
      }
      await this._persist(() => this._hub.add(this));
      await this._persist(async () => {
        this._asked = true;
        await this._key.subscribe((message) => this._receive(message));
        await this._joined?.subscribe(() => {});
      });
      await this._firstState();
    } catch (error) {
      await this.close();
      throw error;
    }
    setTimeout(() => this._tell(), 0); // when the application has the members
    this._listen("pagehide", () => this._leave(true));
    this._listen("pageshow", (event) => event.persisted && this.renew());
    this._listen("visibilitychange", () => globalThis.document.visibilityState === "visible" && this.renew(), globalThis.document);
  }

  /** Waits for the members, and not for ever: the connection may break now. */
  _firstState() {
    return new Promise((resolve, reject) => {
      const timer = setTimeout(resolve, firstStateWithin);
      this._begun = (error) => {
        clearTimeout(timer);
        error ? reject(error) : resolve();
      };
      if (this._state === "live") this._begun();
    });
  }

  /** Tells what there is, and from now on what changes. */
  _tell() {
    this._isOpen = true;
    this._call(this._options.onState, this._state);
    if (this._closed) return;
    if (this.members.size > 0) this._changed([...this.members.values()], [], []);
    this._call(this._options.onCount, { total: this.members.total, guests: this.members.guests });
  }

  _setState(state) {
    if (state === this._state || this._closed) return;
    this._state = state;
    if (this._isOpen) this._call(this._options.onState, state);
    if (state !== "live") return;
    this._begun();
    this._doubts = 0;
  }

  _changed(join, update, leave) {
    if (this._isOpen && join.length + update.length + leave.length > 0) this._call(this._options.onChange, { join, update, leave });
  }

  _listen(event, listener, target = globalThis.window) {
    if (!target?.addEventListener) return;
    target.addEventListener(event, listener);
    this._undo.push(() => target.removeEventListener(event, listener));
  }

  _persist(f) {
    return persist(f, () => this._closed, pause);
  }

  /** Never rejects. */
  async close() {
    if (this._closed) return;
    this._forget();
    this._setState("closed");
    clearTimeout(this._renewal);
    clearTimeout(this._settling);
    this._begun();
    this._drop();
    for (const undo of this._undo.splice(0)) undo();
    // the SDK may just close its connection, which could have been lost, for all the server knows
    const left = this._asked && !this._hub.joins(this._target, this) && this._leave(false);
    if (this._asked) await Promise.all([this._key, this._joined].map((key) => key?.unsubscribe().catch(() => {})));
    await this._hub.remove(this);
    await left;
  }

  leave() {
    return this.close();
  }

  /** Nobody is known to be present any more. */
  _forget() {
    this._loading++;
    this._next = undefined;
    this._epoch = "";
    this._awaited.clear();
    this._counts = { total: 0, guests: 0 };
    this._count();
    this._replace(new Map());
    this._tellCount();
  }

  /** Leaves sooner than when the server has waited for the connection to come back: a page that
   * goes may be loaded again, and all else is meant. */
  _leave(isUnloading, token = this._hub.pb.authStore.token) {
    const { pb, lastClientId: clientId } = this._hub;
    if (!clientId || !this._joined) return;
    if (sharings.get(pb)?.isAlone === false) return; // other tabs may be present by the same connection
    const query = new URLSearchParams({ topic: this._target, clientId, ...(isUnloading && { grace: reloadWithin }) });
    const headers = token ? { Authorization: token } : {};
    return fetch(urlOf(pb, `/api/notify/presence?${query}`), { method: "DELETE", headers, keepalive: isUnloading }).catch(() => {});
  }

  /** The SDK has subscribed on a new connection, or anew: then a state comes. */
  connected() {
    if (this.isDenied) this._setState("connecting");
    if ("visible" in this._shown) this.joinAs(this._shown.visible);
    if (this._shownFor !== this._hub.user) this._restore(); // a guest has signed in
  }

  disconnected() {
    if (this._state === "live") this._setState("connecting");
  }

  wake() {}

  /** Somebody else signs in: what was shown was about the one before, and what was told was for them. */
  userChanged(token) {
    this._leave(false, token);
    this.disconnected();
    this._shown = {};
    this._drop();
    this._forget();
    this.joinAs(this._options.visible !== false); // before the SDK connects anew
  }

  async askAgain() {
    if (this._closed || this.isDenied) return;
    const { user } = this._hub;
    try {
      await this._fetch("", 1);
    } catch (error) {
      if (user !== this._hub.user || this._closed) return; // that was the answer to somebody else
      if (isRefusal(error)) {
        this._setState("denied");
        this._begun(error);
        this._forget();
        return;
      }
    }
    this._hub.subscribeAfter(this._doubts++);
  }

  /** Tells the server that the user is still here. */
  renew() {
    if (this._closed || this.isDenied || !this._joined) return;
    this._renews = true;
    this._send();
  }

  /** Shows something of the user: the last of several calls counts. */
  show(changes) {
    if (this._closed) return Promise.resolve();
    return new Promise((resolve, reject) => {
      Object.assign(this._wanted, changes);
      this._waiters.push({ changes, resolve, reject });
      this._send();
    });
  }

  /** What was wanted is not any more. */
  _drop() {
    this._wanted = {};
    for (const { resolve } of this._waiters.splice(0)) resolve();
  }

  async _send() {
    if (this._sending) return;
    this._sending = true;
    for (let failures = 0; !this._closed && (this._waiters.length > 0 || this._renews); ) {
      const { user } = this._hub;
      const { clientId } = this._hub.pb.realtime;
      const wanted = this._wanted;
      const waiters = this._waiters;
      this._wanted = {};
      this._waiters = [];
      this._renews = false;
      const finish = (isOver, how) => {
        for (const waiter of waiters.splice(0)) isOver(waiter) ? how(waiter) : waiters.push(waiter);
      };
      const again = () => {
        this._wanted = { ...wanted, ...this._wanted };
        this._waiters = [...waiters, ...this._waiters];
        this._renews = true;
      };
      try {
        await this._put(wanted);
        if (user === this._hub.user) {
          this._shownFor = user;
          Object.assign(this._shown, wanted);
          if ("visible" in wanted) this._hub.joinAs(this._target, wanted.visible);
        }
        finish(() => true, ({ resolve }) => resolve());
        failures = 0;
      } catch (error) {
        const { data } = error.response ?? {};
        if (user !== this._hub.user) {
          finish(() => true, ({ resolve }) => resolve());
        } else if (isRefusal(error) && data.clientId && this._nameless !== clientId) {
          this._nameless = clientId;
          again();
        } else if (isRefusal(error) && data.meta) {
          finish(({ changes }) => "meta" in changes, ({ reject }) => reject(error));
          if (wanted.meta === this._shown.meta) delete this._shown.meta;
          delete wanted.meta;
          if (Object.keys(wanted).length > 0) again();
        } else if (error.status !== 429 && (isRefusal(error) || failures === openTries)) {
          finish(() => true, ({ reject }) => reject(error));
          failures = 0;
        } else {
          again();
          await pause(error.status === 429 ? 500 : backoff(failures++));
        }
      }
    }
    this._sending = false;
    if (this._closed) this._drop();
  }

  /** Makes the user begin as visible, or not, on the next connection. The SDK has what it will ask
   * for then when this returns; whether it can tell the server now does not matter. */
  joinAs(isVisible) {
    const before = this._joined;
    if (this._closed || !before || before.isVisible === isVisible) return;
    this._joined = this._newJoin(isVisible);
    this._joined.subscribe(() => {}, true).catch(() => {});
    before.unsubscribe().catch(() => {});
  }

  /** The server may have forgotten what was shown: it has started anew, or the user was away for too long. */
  _restore() {
    const { meta, visible } = this._shown;
    const changes = { ...(meta !== undefined && { meta }), ...(visible === false && { visible }), ...this._wanted };
    if (!this._hub.user || Object.keys(changes).length === 0) return;
    const own = [...this.members].find(([user]) => this._isOwn(user))?.[1];
    // what a member with other connections shows was set by one of these since
    if (!own || (own.meta === null && own.connections === 1)) this.show(changes).catch(() => {});
  }

  _isOwn(user) {
    const [, id] = this._hub.user.split(":"); // of the record, which no other collection has
    return id !== undefined && user.endsWith(`:${id}`);
  }

  _put(changes) {
    const { pb } = this._hub;
    const { clientId } = pb.realtime;
    const isNamed = clientId && clientId !== this._nameless && this._asked && this._joined;
    if (!pb.authStore.token) { // guests are only counted
      if (!isNamed) return;
      changes = {};
    }
    return this._request({ method: "PUT", fetch: fetchNoContent, body: { topic: this._target, ...changes, ...(isNamed && { clientId }) } });
  }

  /** The browser may send it on a connection that is dead. */
  async _request(options) {
    const { signal, done } = timeout(submitWithin);
    try {
      return await this._hub.pb.send("/api/notify/presence", { requestKey: null, signal, ...options });
    } finally {
      done();
    }
  }

  _fetch(cursor, limit) {
    return this._request({ query: { topic: this._target, cursor, limit } });
  }

  _receive(message) {
    if (this._closed || !isObject(message) || typeof message.epoch !== "string" || !Number.isInteger(message.seq)) return;
    const { clientId } = this._hub.pb.realtime;
    const isFirst = this._stateOn !== clientId; // on this connection
    if (message.type === "diff" && (message.epoch !== this._epoch || message.seq <= this._seq)) return;
    const isRestarted = this._epoch !== "" && message.epoch !== this._epoch;
    this._counts = { total: message.total, guests: message.guests };
    this._epoch = message.epoch;
    this._seq = message.seq;
    this._count();
    switch (message.type) {
      case "state":
        if (!Array.isArray(message.members)) return;
        this._stateOn = clientId;
        this._renewEvery(message.renew);
        this._begin(message, isFirst, isRestarted);
        break;
      case "count":
        this._stateOn = clientId;
        this._renewEvery(message.renew);
        this._loading++;
        this._next = undefined;
        this._awaited.clear();
        this._replace(new Map());
        this._setState("live");
        if (isFirst) this._restore();
        break;
      case "diff":
        this._apply(message);
        if (message.join?.some(({ user }) => this._isOwn(user))) this._restore(); // it was away
        break;
    }
    this._tellCount();
  }

  _count() {
    const { total, guests } = this._counts;
    this.members.total = this._awaited.size > 0 ? Math.max(total, this.members.size) : total;
    this.members.guests = guests;
  }

  _tellCount() {
    const { total, guests } = this.members;
    if (this._isOpen) this._call(this._options.onCount, { total, guests });
  }

  /** A state begins; its other pages are fetched. */
  async _begin(state, isFirst, isRestarted) {
    const loading = ++this._loading;
    if (isRestarted) { // and the others are on their way back, too
      for (const user of this.members.keys()) this._awaited.add(user);
      clearTimeout(this._settling);
      this._settling = setTimeout(() => this._settle(), backWithin);
    }
    this._next = { members: new Map(state.members.map((member) => [member.user, member])), touched: new Map() };
    const isOver = () => loading !== this._loading || this._closed;
    // one that comes without being asked for comes to all watchers at once
    if (state.next && !isFirst) await pause(Math.random() * 2000);
    for (let cursor = state.next, failures = 0; cursor && !isOver(); ) {
      let page;
      try {
        page = await this._fetch(cursor, 1000);
      } catch (error) {
        if (isRefusal(error) && !isOver()) return this.askAgain();
      }
      if (isOver()) return;
      if (!isObject(page) || !Array.isArray(page.members) || typeof page.next !== "string" || page.epoch !== this._epoch) {
        await pause(backoff(failures++));
        continue;
      }
      for (const member of page.members) {
        if (!(this._next.touched.get(member.user) > page.seq)) this._next.members.set(member.user, member);
      }
      cursor = page.next;
    }
    if (isOver()) return;
    const { members } = this._next;
    this._next = undefined;
    for (const user of [...this._awaited]) {
      if (members.has(user)) this._awaited.delete(user);
      else members.set(user, this.members.get(user));
    }
    this._replace(members);
    this._count();
    this._setState("live");
    this._restore();
  }

  /** After a restart, members that have not come back have left. */
  _settle() {
    const leave = [...this._awaited].filter((user) => this.members.has(user));
    this._awaited.clear();
    this.members.change([], [], leave);
    this._count();
    this._changed([], [], leave);
    if (leave.length > 0) this._tellCount();
  }

  _apply({ seq, join = [], update = [], leave = [] }) {
    if (this._next) {
      for (const member of [...join, ...update]) this._next.members.set(member.user, member);
      for (const user of leave) this._next.members.delete(user);
      for (const user of [...[...join, ...update].map(({ user }) => user), ...leave]) this._next.touched.set(user, seq);
      return;
    }
    const isBack = ({ user }) => this._awaited.has(user);
    const [back, others] = [join.filter(isBack), join.filter((member) => !isBack(member))];
    for (const user of [...back.map(({ user }) => user), ...leave]) this._awaited.delete(user);
    this.members.change(join, update, leave);
    this._count();
    this._changed(others, [...back, ...update], leave);
  }

  /** Makes members the ones that are present, and tells what that changes. */
  _replace(members) {
    const before = this.members;
    const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);
    const join = [...members.values()].filter(({ user }) => !before.has(user));
    const update = [...members.values()].filter((member) => before.has(member.user) && !same(before.get(member.user), member));
    const leave = [...before.keys()].filter((user) => !members.has(user));
    before.change(join, update, leave);
    this._changed(join, update, leave);
  }

  /** seconds is undefined where nobody has to renew. */
  _renewEvery(seconds) {
    clearTimeout(this._renewal);
    if (!(seconds > 0)) return;
    this._renewal = setTimeout(() => {
      if (globalThis.document?.visibilityState !== "hidden") this.renew();
      this._renewEvery(seconds);
    }, seconds * 1000 * (0.7 + 0.3 * Math.random())); // not all at once
  }

  _call(f, ...args) {
    try {
      f?.(...args);
    } catch (error) {
      console.error(error);
    }
  }
}

/** See herald.d.ts. */
class Presence extends Map {
  constructor(watch) {
    super();
    this.total = 0;
    this.guests = 0;
    Object.defineProperty(this, "_watch", { value: watch }); // not for JSON and logs
  }

  async set(meta) {
    if (meta !== undefined && JSON.stringify(meta) === undefined) throw new TypeError("herald.js: meta must be JSON"); // a circle throws, too
    return this._watch.show({ meta: meta ?? null });
  }

  hide() {
    return this._watch.show({ visible: false });
  }

  show() {
    return this._watch.show({ visible: true });
  }

  leave() {
    return this._watch.leave();
  }

  /** Not for applications. */
  change(join, update, leave) {
    for (const member of [...join, ...update]) super.set(member.user, member);
    for (const user of leave) super.delete(user);
  }
}

/** The method has another name in older SDKs. */
const urlOf = (pb, path) => (pb.buildURL ? pb.buildURL(path) : pb.buildUrl(path));

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

const backoff = (failures) => Math.min(10000, 300 * 2 ** failures) * (0.5 + Math.random() / 2); // ms

/** Calls f until it succeeds, the server refuses, it has failed too often, or it is over. Pauses before it tries again. */
async function persist(f, isOver, pause) {
  for (let failures = 0; ; failures++) {
    try {
      return await f();
    } catch (error) {
      if (isRefusal(error) || failures + 1 === openTries || isOver()) throw error;
    }
    await pause(backoff(failures));
  }
}

const isObject = (value) => typeof value === "object" && value !== null;

/** What came is whole, and an answer of Herald's: the SDK makes {} of a cut answer and of
 * a proxy's HTML. */
const isPage = (page, topic) =>
  isObject(page) && typeof page.epoch === "string" && typeof page.next === "string" && Number.isInteger(page.head) &&
  typeof page.complete === "boolean" && Array.isArray(page.items) && page.items.every((item) => isMessage(item, topic)) &&
  (page.next === "" ? page.epoch === "" : page.next.startsWith(`${page.epoch}:`));

/** As fetch, for a request that Herald answers with 204. The SDK takes a proxy's HTML with 200 for that. */
const fetchNoContent = async (...args) => {
  const response = await fetch(...args);
  if (response.status === 200) throw new Error("the answer is none of Herald's");
  return response;
};

const isMessage = (message, topic) =>
  isObject(message) && message.topic === topic && typeof message.id === "string" && typeof message.epoch === "string" &&
  Number.isInteger(message.seq) && typeof message.time === "string" && "data" in message;

/** The server itself says no, for a reason that does not pass: with a code in the fields
 * that belong to a subscription. A proxy's 403 or 404 has none. */
const isRefusal = ({ status, response }) => {
  if ((status !== 400 && status !== 403 && status !== 413) || response?.status !== status || !isObject(response.data)) return false;
  const { topic, since, rewind, meta, clientId, subscriptions } = response.data;
  return [topic, since, rewind, meta, clientId, ...(isObject(subscriptions) ? Object.values(subscriptions) : [])]
    .some((field) => isObject(field) && typeof field.code === "string" && field.code.startsWith("validation_"));
};

const numberOf = (position) => Number(position.slice(position.lastIndexOf(":") + 1)) || 0;

/** A signal that aborts after ms; AbortSignal.timeout is too new for some. */
const timeout = (ms) => {
  const controller = new AbortController();
  const timer = setTimeout(() => controller.abort(), ms);
  return { signal: controller.signal, done: () => clearTimeout(timer) };
};

/** As atob, which older React Native lacks. */
const decodeBase64 = (text) => {
  const digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  let decoded = "";
  let bits = 0;
  let count = 0;
  for (const digit of text.replace(/=+$/, "")) {
    if (!digits.includes(digit)) throw new Error("not Base64");
    bits = ((bits << 6) | digits.indexOf(digit)) & 0xfff;
    count += 6;
    if (count >= 8) decoded += String.fromCharCode((bits >> (count -= 8)) & 0xff);
  }
  return decoded;
};

const lastOf = (list) => list[list.length - 1];

/** Who the token says is signed in; empty: a guest. That it may have expired is for the
 * server to say: its clock counts. */
const userOf = ({ token }) => {
  if (!token) return "";
  try {
    const payload = token.split(".")[1].replace(/-/g, "+").replace(/_/g, "/");
    const { collectionId, id } = JSON.parse(decodeBase64(payload));
    if (id) return `${collectionId}:${id}`;
  } catch {
    // a token of the application's own
  }
  return token;
};

/** Makes the SDK connect anew: its connection is dead. */
const kick = ({ realtime }, connection) => {
  if (connection && realtime.clientId === connection) realtime.eventSource?.onerror?.({ type: "error" });
};

/** Cancels requests to subscribe on connections that are gone. Where one of two failed, the SDK (0.28) has forgotten the
 * connection by the time it would cancel the other one, and sends nothing more before that is answered. */
const cancelStale = (pb) => {
  const current = `realtime_${pb.realtime.clientId}`;
  for (const key of Object.keys(pb.cancelControllers ?? {})) { // a private field, which the oldest SDK has, too
    if (/^realtime_\w{40}$/.test(key) && key !== current) pb.cancelRequest(key); // other keys are the application's
  }
};

// What the subscriptions of one SDK client share: they learn from it about the connection,
// who is signed in, and which topics are denied.
class Hub {
  constructor(pb) {
    this._subscriptions = new Set();
    this._opening = null;
    this._keys = []; // of its own subscriptions
    this._undo = []; // what close has to undo
    this._turn = Promise.resolve(); // of subscribeAgain, one after another
    this._queued = 0; // those that have not begun
    this._running = false;
    this._submitting = false; // by submitAgain, or a moment ago
    this._every = 0; // ms between two beats; 0: none are expected
    this._silent = 0; // connections in a row that have never beaten
    this._beaten = false; // this one has
    this._overdue = undefined; // the timer
    this.user = ""; // who is signed in
    this._token = ""; // of that user
    this.connection = ""; // the client id under which the SDK has subscribed; empty: it has not

    this._wanted = []; // pages that are asked for
    this._isOlder = false; // the server answers for one topic at a time
    this._clientIds = []; // of the connections that the user has had, the last ones
    this.pb = pb;
  }

  /** The connections so far, for the history: what was sent to one of them was for this client, and what left one out was not. */
  get clientIds() {
    const { clientId } = this.pb.realtime;
    if (clientId && lastOf(this._clientIds) !== clientId) this._clientIds = [...this._clientIds.slice(1 - maxClientIds), clientId];
    return this._clientIds.join(",");
  }

  /** A page of the history. Those that are asked for at once come by one request. */
  page(query, failures) {
    return new Promise((resolve, reject) => {
      this._wanted.push({ query, failures, resolve, reject });
      if (this._wanted.length === 1) Promise.resolve().then(() => this._fetchWanted());
    });
  }

  _fetchWanted() {
    for (const all = this._wanted.splice(0); all.length > 0; ) {
      const some = all.splice(0, this._isOlder ? 1 : maxPages);
      this._fetchPages(some).catch((error) => {
        // a server without this route, by PocketBase's own answer: one by one, then
        if (some.length > 1 && error.status === 404 && error.response?.status === 404) this._isOlder = true;
        for (const { reject } of some) reject(error);
      });
    }
  }

  async _fetchPages(all) {
    const clientId = this.clientIds || undefined;
    // the browser may have sent it on a connection that is dead
    const { signal, done } = timeout(Math.min(30, 5 + 5 * Math.max(...all.map(({ failures }) => failures))) * 1000);
    try {
      if (all.length === 1) {
        const [{ query, resolve }] = all;
        resolve(await this.pb.send("/api/notify/history", { query: { ...query, ...(clientId && { clientId }) }, requestKey: null, signal }));
        return;
      }
      const topics = all.map(({ query: { rewind, ...query } }) => ({ ...query, ...(rewind !== undefined && { rewind: String(rewind) }) }));
      const pages = await this.pb.send("/api/notify/history", { method: "POST", body: { topics, clientId }, requestKey: null, signal });
      if (!Array.isArray(pages) || pages.length !== all.length) throw new Error("the answer is none of Herald's");
      pages.forEach((page, i) => {
        if (page?.status === 200) all[i].resolve(page.body);
        else all[i].reject(Object.assign(new Error(page?.body?.message), { status: page?.status, response: page?.body }));
      });
    } finally {
      done();
    }
  }

  /** That of the connection, or of the one that there was. */
  get lastClientId() {
    return this.pb.realtime.clientId || lastOf(this._clientIds);
  }

  async add(subscription) {
    this._subscriptions.add(subscription);
    this._opening = this._opening || this._open();
    try {
      await this._opening;
    } catch (error) {
      await this._close();
      throw error;
    }
  }

  async remove(subscription) {
    this._subscriptions.delete(subscription);
    if (this._subscriptions.size === 0 && this._opening) await this._close();
  }

  async _close() {
    this._opening = null;
    this.connection = "";
    clearTimeout(this._overdue);
    for (const undo of this._undo.splice(0)) undo();
    await Promise.all(this._keys.splice(0).map((key) => key.unsubscribe().catch(() => {})));
  }

  /** All of a user's watches of a topic show the same. */
  joinAs(topic, isVisible) {
    this._each((subscription) => subscription.joins?.(topic) && subscription.joinAs(isVisible));
  }

  /** Whether another subscription than one makes its user present on a topic. */
  joins(topic, one) {
    return [...this._subscriptions].some((subscription) => subscription !== one && subscription.joins?.(topic));
  }

  _each(f) {
    for (const subscription of [...this._subscriptions]) f(subscription);
  }

  async _open() {
    const { realtime, authStore } = this.pb;
    this.user = userOf(authStore);
    this._token = authStore.token;
    const before = realtime.isConnected ? realtime.clientId : "";
    const disconnect = realtime.onDisconnect;
    const onDisconnect = (topics) => {
      this._disconnected();
      return disconnect?.(topics);
    };
    realtime.onDisconnect = onDisconnect; // the SDK has it since 0.23
    this._undo.push(() => {
      if (realtime.onDisconnect === onDisconnect) realtime.onDisconnect = disconnect;
    });
    for (const name of ["unsubscribe", "unsubscribeByPrefix"]) this._watch(realtime, name);
    this._undo.push(authStore.onChange(() => this._authChanged()));
    this._listen(globalThis, "online", () => true);
    this._listen(globalThis.document, "visibilitychange", () => document.visibilityState === "visible");

    // The SDK (0.28) stops trying where a connection breaks while it subscribes on it:
    // then it clears the timer of its next try. To subscribe makes it try again.
    const timer = setInterval(() => {
      cancelStale(this.pb);
      if (this.connection && this.connection !== realtime.clientId) this._disconnected();
      if (!this.connection && !this._running) this.subscribeAgain();
    }, watchEvery);
    this._undo.push(() => clearInterval(timer));

    await this._subscribe();
    // there was a connection already, of which nobody tells
    if (before && before === realtime.clientId) this._connected(before);
  }

  async _subscribe() {
    const { realtime } = this.pb;
    const listeners = {
      PB_CONNECT: () => {
        if (!realtime.clientId) return this.subscribeAgain(); // see above
        this._connected(realtime.clientId);
        this._each((subscription) => subscription.connected(this.connection));
      },
      "@denied": ({ topic }) => this._each((subscription) => topic === subscription.topic && subscription.askAgain()),
      "@beat": ({ every }) => {
        this._beaten = true;
        this._silent = 0;
        this.expectBeats(every);
        this._awaitBeat();
      },
    };
    const keys = Object.keys(listeners).map((topic) => new Key(this.pb, topic, {}));
    this._keys.push(...keys);
    await Promise.all(keys.map((key) => key.subscribe(listeners[key.topic])));
  }

  _connected(id) {
    this.connection = id;
    this.clientIds; // keeps it
    this._beaten = false;
    this._awaitBeat();
  }

  _disconnected() {
    this.connection = "";
    clearTimeout(this._overdue);
    this._each((subscription) => subscription.disconnected());
  }

  /** The server says how often it beats, in seconds; 0: never. */
  expectBeats(every) {
    if (typeof every === "number" && every >= 0) this._every = every * 1000;
  }

  _awaitBeat() {
    clearTimeout(this._overdue);
    const id = this.connection;
    // one beat may be late, as timers are in a tab behind others
    const ms = this._beaten ? 2.5 * this._every : Math.min(600000, firstBeatWithin * 2 ** this._silent);
    if (!id || (this._every === 0 && this._beaten)) return;
    this._overdue = setTimeout(() => {
      if (id !== this.connection || this._every === 0) return;
      // more and more seldom: one whose client a hook of the application has wrapped never beats
      if (!this._beaten) this._silent++;
      kick(this.pb, id);
    }, ms);
  }

  /** Notices when the application ends subscriptions by a call of the SDK. */
  _watch(realtime, name) {
    const isOwn = Object.prototype.hasOwnProperty.call(realtime, name);
    const original = realtime[name];
    const watching = (...args) => {
      const result = original.apply(realtime, args); // it forgets at once, and then tells the server
      this._forget();
      return result;
    };
    realtime[name] = watching;
    this._undo.push(() => {
      if (realtime[name] !== watching) return;
      if (isOwn) realtime[name] = original;
      else delete realtime[name];
    });
  }

  /** Closes the subscriptions that the SDK has forgotten. */
  _forget() {
    const forgotten = [...this._subscriptions].filter((subscription) => subscription.isForgotten);
    for (const subscription of forgotten) this._subscriptions.delete(subscription);
    if (this._subscriptions.size === 0) this._close(); // at once: the application may subscribe anew
    for (const subscription of forgotten) subscription.close();
    if (this._subscriptions.size === 0 || !this._keys.some((key) => key.isForgotten)) return;
    // only those of the hub were meant, such as all of PB_CONNECT
    for (const key of this._keys.splice(0)) key.unsubscribe().catch(() => {});
    this._subscribe().catch(() => this.subscribeAgain());
  }

  _listen(target, event, isBack) {
    if (!target?.addEventListener) return;
    const listener = () => isBack() && this._each((subscription) => subscription.wake());
    target.addEventListener(event, listener);
    this._undo.push(() => target.removeEventListener(event, listener));
  }

  kick(connection) {
    kick(this.pb, connection);
  }

  _authChanged() {
    const [before, token] = [this.user, this._token];
    this.user = userOf(this.pb.authStore);
    this._token = this.pb.authStore.token;
    const { clientId } = this.pb.realtime;
    if (before && before !== this.user) this._clientIds = [];
    if (before === this.user) {
      // a renewed token, which may be let in
      if ([...this._subscriptions].some(({ isDenied }) => isDenied)) this.subscribeAgain();
    } else if (before && clientId) {
      // What is on its way on a user's connection is not for the next one, who gets
      // another connection.
      this._each((subscription) => subscription.userChanged(token));
      kick(this.pb, clientId);
    } else {
      this._each((subscription) => before && subscription.userChanged(token));
      this.subscribeAgain();
    }
  }

  /** Makes the SDK subscribe to all topics anew, as whoever is signed in now. */
  subscribeAgain(failures = 0) {
    if (this._queued > 0) return; // that one will do
    this._queued++;
    this._turn = this._turn.then(async () => {
      this._queued--;
      this._running = true;
      await this._subscribeAgain(failures);
    }).catch(console.error).finally(() => (this._running = false));
  }

  /** Makes the SDK send its topics again, on the connection that there is. */
  submitAgain() {
    if (this._submitting) return;
    this._submitting = true;
    this._turn = this._turn.then(async () => {
      if (this._opening) await this._sendTopics().catch(() => {});
      setTimeout(() => (this._submitting = false), submitEvery);
    });
  }

  /** The server has said no, and yes when it was asked: at once for the first time, and then less and less often. */
  async subscribeAfter(doubts) {
    if (doubts > 0) await pause(backoff(doubts));
    this.subscribeAgain();
  }

  async _subscribeAgain(failures) {
    if (!this._opening) return;
    const id = this.connection;
    try {
      await this._sendTopics();
    } catch {
      if (this._opening) setTimeout(() => this._opening && this.subscribeAgain(failures + 1), backoff(failures));
      return;
    }
    if (id && id === this.connection && id === this.pb.realtime.clientId) this._each((subscription) => subscription.connected(id));
  }

  /** The SDK sends its topics when they change, and then all of them. */
  async _sendTopics() {
    const another = new Key(this.pb, "@denied", {});
    await another.subscribe(() => {});
    // refused where all that is left to ask for is denied; the server then goes on as before
    await another.unsubscribe().catch(() => {});
  }
}

let keys = 0;

// A subscription of the SDK that is nobody else's, by an option with a number. So it can
// be taken away also where subscribing failed: the SDK keeps the listener then.
class Key {
  constructor(pb, topic, query) {
    this._isAsked = false; // the SDK is to know of it
    this._pb = pb;
    this.topic = topic;
    this._query = { ...query, key: ++keys };
  }

  get _name() {
    return `${this.topic}?options=${encodeURIComponent(JSON.stringify({ query: this._query }))}`;
  }

  /** As the server has it. */
  get sentName() {
    return sharings.get(this._pb)?.nameOf(this._name) ?? this._name;
  }

  /** Somebody else has taken it away from the SDK. */
  get isForgotten() {
    const { subscriptions } = this._pb.realtime;
    return this._isAsked && isObject(subscriptions) && !(subscriptions[this._name]?.length > 0);
  }

  /** Where it fails, the SDK forgets it again, unless it is to keep it for its next connection. */
  async subscribe(listener, keeps = false) {
    try {
      const asked = this._pb.realtime.subscribe(this.topic, listener, { query: this._query });
      this._isAsked = true;
      await this._bounded(asked);
    } catch (error) {
      if (!keeps) await this.unsubscribe().catch(() => {});
      throw error;
    }
  }

  unsubscribe() {
    this._isAsked = false;
    return this._bounded(this._pb.realtime.unsubscribe(this._name));
  }

  /** The SDK waits for an answer for ever, and sends no other request before it. */
  async _bounded(promise) {
    const { clientId } = this._pb.realtime;
    const timer = setTimeout(() => {
      kick(this._pb, clientId);
      cancelStale(this._pb);
    }, submitWithin);
    try {
      return await promise;
    } finally {
      clearTimeout(timer);
    }
  }
}

const hubs = new WeakMap();

function hubOf(pb) {
  if (!hubs.has(pb)) hubs.set(pb, new Hub(pb));
  return hubs.get(pb);
}

/** See herald.d.ts. */
export function shareConnection(pb) {
  if (sharings.has(pb)) return true;
  const { navigator, BroadcastChannel } = globalThis;
  // the method is private; the oldest SDK that is supported has it, and so has the newest
  if (!navigator?.locks?.request || typeof BroadcastChannel !== "function" || typeof pb?.realtime?.initConnect !== "function") return false;
  sharings.set(pb, new Sharing(pb));
  return true;
}

const sharings = new WeakMap();

const answerWithin = 3000; // ms; a tab that leads answers at once, unless it is frozen
const askEvery = 15000; // ms
const quietFor = 5000; // ms in which a stream that is said to be dead has brought nothing

// One stream for all tabs of a user. A tab leads, by a Web Lock: it has the stream, and passes
// on what comes by a BroadcastChannel. In each tab, the SDK gets an EventSource that is none,
// and its requests to subscribe go to the tab that leads, which asks for the topics of all. So the
// SDK, and what builds on it, knows nothing of this. When the tab that leads goes, the locks make
// another one lead; the SDKs of all connect anew, as after any lost connection.
class Sharing {
  constructor(pb) {
    this.tab = Math.random().toString(36).slice(2) + Date.now().toString(36);
    this._name = ""; // of the user's channel and lock; empty: none
    this._channel = undefined;
    this._leader = null; // this tab leads
    this._endLead = () => {};
    this._waiting = undefined; // aborts the wait for the lock
    this._source = null; // that the SDK has now
    this._clientId = ""; // of the stream on which the source is; empty: it waits for one
    this._dead = ""; // the one before
    this._names = new Map(); // the keys of the SDK, by the names under which their events come
    this._requests = new Map(); // that the leader has not answered
    this._lastRequest = 0;
    this._silence = undefined; // the timer of an answer that is due
    this._wasAlone = false; // when it left
    this._hasAsked = false; // the leader knows of the source
    this._pb = pb;
    const { realtime, authStore } = pb;
    this._send = pb.send;
    pb.send = (path, options) => {
      const { clientId, subscriptions } = (path === "/api/realtime" && options?.method === "POST" && options.body) || {};
      return clientId && clientId === this._clientId ? this._submit(subscriptions) : this._send.call(pb, path, options);
    };
    const { initConnect } = realtime;
    this._undo = () => {
      sharings.delete(pb);
      delete realtime.initConnect; // the instance's own
      pb.send = this._send;
    };
    realtime.initConnect = () => {
      const own = Object.getOwnPropertyDescriptor(globalThis, "EventSource");
      const source = new TabSource((closed) => this._closed(closed));
      globalThis.EventSource = function EventSource() {
        return source;
      };
      try {
        initConnect.call(realtime);
      } finally {
        if (own) Object.defineProperty(globalThis, "EventSource", own);
        else delete globalThis.EventSource;
      }
      this._open(source);
    };
    authStore.onChange(() => {
      if (this._nameNow() === this._name) return;
      if (this._source) this._again();
      else this._leave(); // the others go on without this tab, which would lead them with another user's token
    });
    // Resolves when the others can tell that this tab is there: as long as the lock is held.
    this._isHere = new Promise((resolve) => {
      navigator.locks.request(`herald tab ${this.tab}`, () => {
        resolve();
        return new Promise(() => {});
      }).catch(() => { // not allowed here, as in a frame of no origin
        this._undo();
        this._again();
      });
    });
    globalThis.addEventListener?.("pagehide", () => this._leave(true));
    globalThis.addEventListener?.("pageshow", ({ persisted }) => persisted && this._again());
    globalThis.document?.addEventListener("resume", () => this._again()); // it was frozen, and may have missed something
    setInterval(() => this._clientId && !this._leader && this._ask({ type: "ask" }), askEvery);
    if (realtime.eventSource) kick(pb, realtime.clientId); // the connection that there is becomes the shared one
  }

  /** No other tab needs the stream. */
  get isAlone() {
    return this._leader ? this._leader.tabs <= 1 : this._wasAlone;
  }

  /** Only tabs that share the SDK's store have the same token at any time, and so the same rights. */
  _nameNow() {
    const { authStore, baseURL = this._pb.baseUrl } = this._pb;
    return `herald ${new URL(baseURL, globalThis.location?.href)} ${storageOf(authStore) ?? this.tab} ${userOf(authStore)}`;
  }

  /** Makes the SDK connect anew. While it connects for the first time, a failure would be final. */
  _again() {
    if (this._clientId) this._source?.fail();
    else if (this._source) this._pb.realtime.initConnect();
  }

  /** The SDK connects. */
  _open(source) {
    this._source = source;
    this._clientId = "";
    this._hasAsked = false;
    this._names.clear();
    const name = this._nameNow();
    if (name !== this._name) {
      this._leave();
      this._enter(name);
    }
    this._hello();
  }

  async _hello() {
    const source = this._source;
    await this._isHere;
    if (!source || source !== this._source || this._clientId) return;
    this._hasAsked = true;
    this._ask({ type: "hello", dead: this._dead });
  }

  _enter(name) {
    this._name = name;
    this._wasAlone = false;
    this._dead = "";
    const channel = new BroadcastChannel(name);
    this._channel = channel;
    channel.onmessage = ({ data }) => channel === this._channel && this._receive(data);
    this._wait({});
  }

  /** Waits for the lock, or steals it from a tab that does not answer. */
  _wait(options) {
    const name = this._name;
    const waiting = options.steal ? undefined : new AbortController();
    this._waiting?.abort();
    this._waiting = waiting;
    navigator.locks.request(name, { ...options, ...(waiting && { signal: waiting.signal }) }, () => {
      if (name !== this._name || waiting?.signal.aborted) return;
      return new Promise((resolve) => {
        this._endLead = resolve;
        this._lead();
      });
    }).catch(() => {
      // taken away while this tab was frozen, or not wanted any more
      if (name !== this._name || waiting?.signal.aborted || !this._leader) return;
      this._resign();
      this._wait({});
      this._source?.fail();
    });
  }

  _lead() {
    clearTimeout(this._silence);
    this._waiting = undefined;
    this._leader = new Leader(this._pb, this._send, (message) => this._post(message));
    const isLate = this._clientId !== "";
    this._post({ type: "leads" });
    if (isLate) this._source?.fail(); // its stream has gone with the tab that led
    else this._hello();
  }

  _resign() {
    this._leader?.close();
    this._leader = null;
    this._endLead();
  }

  /** Leaves the tabs of a user. */
  _leave(isUnloading = false) {
    if (!this._name) return;
    this._wasAlone = this.isAlone;
    this._post({ type: "bye", tab: this.tab, isUnloading });
    clearTimeout(this._silence);
    this._name = "";
    this._waiting?.abort();
    this._waiting = undefined;
    this._resign();
    this._channel.close();
    this._clientId = "";
    this._settle();
  }

  /** The SDK has closed its connection. */
  _closed(source) {
    if (source !== this._source) return;
    this._source = null;
    this._dead = source.isGivenUp ? this._clientId : "";
    this._clientId = "";
    this._settle(!source.hasFailed); // then it has cancelled its requests
    this._post({ type: "bye", tab: this.tab });
  }

  _post(message) {
    if (!this._name) return;
    this._channel.postMessage(message);
    this._receive(message); // a channel does not bring what a tab itself has sent
  }

  /** Sends what the leader has to answer at once. */
  _ask(message) {
    clearTimeout(this._silence);
    const name = this._name;
    this._silence = setTimeout(() => {
      if (name === this._name && !this._leader) this._wait({ steal: true });
    }, answerWithin * (1 + Math.random())); // not all tabs at once
    this._post({ ...message, tab: this.tab });
  }

  _submit(keys) {
    this._names = new Map(keys.map((key) => [this.nameOf(key), key]));
    return new Promise((resolve, reject) => {
      const id = ++this._lastRequest;
      this._requests.set(id, { resolve, reject });
      this._ask({ type: "keys", id, clientId: this._clientId, names: [...this._names.keys()], token: this._pb.authStore.token });
    });
  }

  /** Each tab has names of its own: the server answers each subscription of its own, and what begins with the past or with
   * who is present begins for each tab. */
  nameOf(key) {
    const [topic, text] = key.split("?options=");
    if (topic === "PB_CONNECT") return key;
    let options = {};
    try {
      options = JSON.parse(decodeURIComponent(text ?? "{}"));
    } catch {
      return key;
    }
    return `${topic}?options=${encodeURIComponent(JSON.stringify({ ...options, query: { ...options.query, tab: this.tab } }))}`;
  }

  /** The requests that are under way get no answer any more. */
  _settle(isAbort = false) {
    for (const { reject } of this._requests.values()) reject(Object.assign(new Error("the connection is lost"), { status: 0, isAbort }));
    this._requests.clear();
  }

  _receive(message) {
    const { type, to } = message;
    if (this._leader?.receive(message)) return;
    if (to !== undefined && to !== this.tab) return;
    switch (type) {
      case "leads": // another one than before
        if (this._leader) return;
        clearTimeout(this._silence);
        if (this._clientId) this._source?.fail();
        else this._hello();
        break;
      case "here":
        clearTimeout(this._silence);
        break;
      case "up":
        if (!this._source || this._clientId || !this._hasAsked) return;
        this._clientId = message.clientId;
        this._source.dispatch("PB_CONNECT", message);
        break;
      case "down":
        if (this._clientId === message.clientId) this._source?.fail();
        break;
      case "answer": {
        clearTimeout(this._silence);
        const request = this._requests.get(message.id);
        this._requests.delete(message.id);
        if (message.error) request?.reject(Object.assign(new Error(message.error.message), message.error, { data: message.error.response }));
        else request?.resolve({});
        break;
      }
      case "event":
        if (message.clientId === this._clientId && this._names.has(message.name)) this._source?.dispatch(this._names.get(message.name), message);
        break;
    }
  }
}

/** The key under which a store keeps its token for all tabs; undefined where it does not. */
const storageOf = ({ storageKey }) => {
  try {
    return globalThis.localStorage && typeof storageKey === "string" ? storageKey : undefined;
  } catch {
    return undefined; // not allowed
  }
};

// What the SDK takes for an EventSource.
class TabSource {
  constructor(onClose) {
    this.hasFailed = false;
    this.isGivenUp = false; // by the SDK's user, who has heard nothing for too long
    this._onerror = null;
    this._listeners = new Map();
    this._isOver = false;
    this._onClose = onClose;
  }

  get onerror() {
    return () => {
      this.isGivenUp = true;
      this.fail();
    };
  }

  set onerror(listener) {
    this._onerror = listener;
  }

  addEventListener(name, listener) {
    if (!this._listeners.has(name)) this._listeners.set(name, new Set());
    this._listeners.get(name).add(listener);
  }

  removeEventListener(name, listener) {
    this._listeners.get(name)?.delete(listener);
  }

  dispatch(type, { data, id }) {
    for (const listener of [...(this._listeners.get(type) ?? [])]) {
      if (this._isOver) return;
      try {
        listener({ type, data, lastEventId: id });
      } catch (error) {
        console.error(error);
      }
    }
  }

  /** The connection is lost. */
  fail() {
    if (this._isOver) return;
    this.hasFailed = true;
    this._onerror?.({ type: "error" });
  }

  close() {
    this._isOver = true;
    this._onClose(this);
  }
}

// The stream, and the topics of all tabs.
class Leader {
  constructor(pb, send, post) {
    this._source = null;
    this._clientId = "";
    this._tabs = new Map(); // the names that each tab wants
    this._parting = new Set(); // those of tabs that have just gone
    this._turn = Promise.resolve(); // of requests, one after another
    this._failures = 0;
    this._opening = undefined; // the timer
    this._heard = 0; // when something came
    this._known = new Set(); // the tabs whose end is awaited
    this._isClosed = false;
    this._listened = new Set(); // names
    this._token = ""; // that the server has accepted
    this._pb = pb;
    this._send = send;
    this._post = post;
  }

  get tabs() {
    return this._tabs.size;
  }

  /** Takes a message that is for the tab that leads. */
  receive({ type, tab, dead, id, clientId, names, token, isUnloading }) {
    switch (type) {
      case "hello":
        this._post({ type: "here", to: tab });
        this._hello(tab, dead);
        return true;
      case "ask":
        this._post(this._tabs.has(tab) ? { type: "here", to: tab } : { type: "leads", to: tab });
        return true;
      case "keys":
        this._post({ type: "here", to: tab });
        this._turn = this._turn.then(() => this._submit(tab, clientId, names, token, id));
        return true;
      case "bye":
        this._bye(tab, isUnloading);
        return true;
    }
    return false;
  }

  _hello(tab, dead) {
    // the tab noticed before this one, which may be in the background
    if (dead && dead === this._clientId && Date.now() - this._heard > quietFor) this._fail();
    this._tabs.set(tab, []);
    this._awaitEnd(tab);
    if (this._clientId) this._announce(tab);
    else if (!this._source && !this._opening) this._openLater();
  }

  /** A tab that ends without a word gives its lock back. */
  _awaitEnd(tab) {
    if (this._known.has(tab)) return;
    this._known.add(tab);
    navigator.locks.request(`herald tab ${tab}`, { mode: "shared" }, () => {}).then(() => {
      this._known.delete(tab);
      if (!this._isClosed) this._bye(tab, true);
    }, () => {});
  }

  /** A page that goes may be loaded again: until then its user stays where they are present. */
  _bye(tab, isUnloading) {
    const names = this._tabs.get(tab);
    if (!this._tabs.delete(tab)) return;
    if (this._tabs.size === 0) return this._disconnect();
    if (names.length === 0) return;
    const forget = () => {
      this._parting.delete(names);
      this._turn = this._turn.then(() => this._request().catch(() => {}));
    };
    if (!isUnloading) return forget();
    this._parting.add(names);
    setTimeout(forget, reloadWithin * 1000);
  }

  _openLater() {
    this._opening = setTimeout(() => {
      this._opening = undefined;
      this._open();
    }, this._failures && backoff(this._failures - 1));
  }

  _open() {
    const source = new EventSource(urlOf(this._pb, "/api/realtime"));
    this._source = source;
    this._listened.clear();
    source.onerror = () => source === this._source && this._fail();
    source.addEventListener("PB_CONNECT", ({ lastEventId: id }) => {
      if (source !== this._source) return;
      this._clientId = id;
      this._failures = 0;
      this._heard = Date.now();
      this._announce();
    });
  }

  /** Tells a tab, or all, that the stream is there, as PB_CONNECT does. */
  _announce(to) {
    const id = this._clientId;
    this._post({ type: "up", to, clientId: id, data: JSON.stringify({ clientId: id }), id });
  }

  _disconnect() {
    clearTimeout(this._opening);
    this._opening = undefined;
    this._parting.clear();
    this._source?.close();
    this._source = null;
    this._clientId = "";
  }

  _fail() {
    const clientId = this._clientId;
    this._disconnect();
    this._failures++;
    if (clientId) {
      this._tabs.clear();
      this._post({ type: "down", clientId });
    } else if (this._tabs.size > 0) {
      this._openLater();
    }
  }

  /** Subscribes for a tab. It is answered as the SDK would have been. */
  async _submit(tab, clientId, names, token, id) {
    const before = this._tabs.get(tab);
    let error;
    if (!before || clientId !== this._clientId) {
      error = { message: "the connection is lost", status: 0 };
    } else {
      this._tabs.set(tab, names);
      try {
        await this._request(token);
        this._token = token;
      } catch ({ message, status, response }) {
        error = { message, status, response };
        if (this._clientId === clientId && this._tabs.get(tab) === names) this._tabs.set(tab, before);
      }
    }
    this._post({ type: "answer", to: tab, id, error });
  }

  /** Asks for the topics of all tabs. */
  async _request(token = this._token) {
    const clientId = this._clientId;
    if (!clientId) return;
    const names = [...new Set([...this._tabs.values(), ...this._parting].flat())];
    for (const name of names) this._listen(name);
    const { signal, done } = timeout(submitWithin);
    try {
      await this._send.call(this._pb, "/api/realtime", {
        method: "POST", body: { clientId, subscriptions: names }, headers: { Authorization: token }, requestKey: null, signal,
      });
    } finally {
      done();
    }
  }

  _listen(name) {
    if (this._listened.has(name) || name.split("?")[0] === "PB_CONNECT") return;
    this._listened.add(name);
    const source = this._source;
    source.addEventListener(name, ({ data, lastEventId: id }) => {
      if (source !== this._source) return;
      this._heard = Date.now();
      this._post({ type: "event", clientId: this._clientId, name, data, id });
    });
  }

  close() {
    this._isClosed = true;
    this._tabs.clear();
    this._disconnect();
  }
}
