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
const submitWithin = 15_000; // ms
const firstBeatWithin = 5000; // ms
const submitEvery = 1000; // ms
const openTries = 5;
const firstStateWithin = 10_000; // ms
const reloadWithin = 3; // s
const backWithin = 10_000; // ms; the server waits as long for a lost connection to come back
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
  #hub;
  #callback;
  #options;
  #epoch = ""; // with #seq the position; empty: not known
  #seq = 0;
  #state = "";
  #connection = ""; // the client id of the connection on which it is subscribed
  #asked = false; // the SDK knows of it
  #waiting = []; // live messages that came before their turn
  #dropped = false; // some of these were too many
  #doubts = 0; // how often it was denied since it was live
  #lastLive = 0; // highest number that came by the connection
  #recovering = false;
  #again = false; // something happened while it was
  #wake = () => {};
  #key;

  constructor(hub, topic, callback, options) {
    this.#hub = hub;
    this.topic = topic;
    this.#key = new Key(hub.pb, topic, { envelope: true });
    this.#callback = callback;
    this.#options = options;
  }

  get #closed() {
    return this.#state === "closed";
  }

  /** The server does not let it listen. */
  get isDenied() {
    return this.#state === "denied";
  }

  get position() {
    return this.#epoch && `${this.#epoch}:${this.#seq}`;
  }

  async open() {
    const { since, rewind } = this.#options;
    this.#setState("connecting");
    try {
      // Where it begins is settled before it is subscribed: what is sent in between is
      // fetched.
      if (since) {
        this.#moveTo(since);
      } else if (rewind !== undefined) {
        this.#take(await this.#fetchForOne({ rewind }));
      } else {
        const { epoch, head } = await this.#persist(() => this.#fetch({ limit: 1 }));
        this.#moveTo(`${epoch}:${head}`);
      }
      await this.#persist(() => this.#hub.add(this));
      const before = this.#hub.connection;
      await this.#persist(() => {
        this.#asked = true;
        return this.#key.subscribe((message) => this.#receive(message));
      });
      // else the SDK is about to connect, and PB_CONNECT comes after it has subscribed
      if (before && before === this.#hub.connection) this.#connection = before;
    } catch (error) {
      await this.close();
      throw error;
    }
    this.recover();
  }

  #persist(f) {
    return persist(f, () => this.#closed, (ms) => {
      this.#asked = false;
      return this.#pause(ms);
    });
  }

  /** Never rejects: the SDK has forgotten the subscription even where it could not tell
   * the server, which hears of it with the next one. */
  async close() {
    if (this.#closed) return;
    this.#setState("closed");
    this.#waiting = [];
    this.#wake();
    if (this.#asked) await this.#key.unsubscribe().catch(() => {});
    await this.#hub.remove(this);
  }

  /** The application has unsubscribed it with the SDK's own calls. */
  get isForgotten() {
    return !this.#closed && this.#key.isForgotten;
  }

  /** Somebody else signs in: what is under way is for the one before. */
  userChanged() {
    this.#waiting = [];
    this.disconnected();
    this.#again = true;
  }

  /** The SDK has subscribed to all topics, on a new connection or anew. */
  connected(id) {
    if (!this.#asked) return;
    if (this.isDenied) this.#setState("connecting");
    this.#connection = id;
    this.#lastLive = 0;
    this.#wake();
    this.recover();
  }

  disconnected() {
    this.#connection = "";
    if (!this.#closed && !this.isDenied) this.#setState("connecting");
  }

  /** The server says that it has ended or refused the subscription. By the time that
   * arrives it may be allowed again. */
  async askAgain() {
    if (this.#closed || this.isDenied) return;
    this.#connection = "";
    const { user } = this.#hub;
    try {
      await this.#fetch({ limit: 1 });
    } catch (error) {
      if (isRefusal(error) && user === this.#hub.user) return this.#denied();
    }
    this.#hub.subscribeAfter(this.#doubts++);
  }

  #denied() {
    this.#connection = "";
    this.#waiting = [];
    this.#setState("denied");
    this.#wake();
  }

  /** The tab or the network is back: the connection may be dead without knowing. */
  async wake() {
    if (this.#closed || this.isDenied) return;
    const { position } = this;
    const connection = this.#connection;
    this.#wake();
    await this.recover();
    const fetched = this.#seq;
    if (!connection || this.position === position) return;
    setTimeout(() => {
      // what was fetched should have come by the connection, too
      if (!this.#closed && this.#connection === connection && this.#lastLive < fetched) this.#hub.kick(connection);
    }, kickAfter);
  }

  /** Fetches what was missed, and goes live where the connection is up. Never rejects. */
  async recover() {
    this.#again = true;
    if (this.#recovering || this.#closed) return;
    this.#recovering = true;
    try {
      await this.#recover();
    } catch (error) {
      console.error(error);
    } finally {
      this.#recovering = false;
    }
  }

  async #recover() {
    let doubted = ""; // the connection that the server does not know to be subscribed
    for (let failures = 0, doubts = 0; !this.#closed; ) {
      this.#setState("recovering");
      this.#again = this.#dropped = false;
      const connection = this.#connection;
      const { user } = this.#hub;
      let page;
      try {
        page = await this.#fetch({ since: this.position, subscription: connection && this.#key.sentName }, failures);
        failures = 0;
      } catch (error) {
        if (this.#isOver) return;
        if (user !== this.#hub.user) continue; // that was the answer to somebody else
        if (isRefusal(error)) {
          if (this.#again && connection !== this.#connection) continue; // signed in meanwhile
          return this.#denied();
        }
        await this.#pause(backoff(failures++));
        if (this.#isOver) return;
        continue;
      }
      if (this.#isOver) return;
      if (user !== this.#hub.user) continue;
      this.#take(page);
      if (this.#isOver) return;
      if (page.epoch && page.next !== `${page.epoch}:${page.head}`) continue;
      if (this.#again || this.#dropped) continue;
      if (!connection || connection !== this.#hub.pb.realtime.clientId) {
        this.#setState("connecting"); // PB_CONNECT comes, and with it recover
        return;
      }
      if (page.subscribed === false) {
        // The SDK says so where another request has replaced its own, which is under way, and where a proxy has answered.
        if (doubted !== connection) doubts = 0;
        doubted = connection;
        if (doubts > 0) this.#hub.submitAgain();
        await this.#pause(backoff(doubts++));
        if (this.#isOver) return;
        continue;
      }
      this.#setState("live");
      this.#doubts = 0;
      for (const message of this.#waiting.splice(0)) this.#receive(message);
      if (!this.#again) return;
    }
  }

  /** There is nothing to recover: it was closed, or denied and nothing came after. */
  get #isOver() {
    return this.#closed || (this.isDenied && !this.#again);
  }

  /** A page of one user: another may sign in before it comes. */
  async #fetchForOne(query) {
    for (const { authStore } = this.#hub.pb; ; ) {
      const user = userOf(authStore);
      const page = await this.#persist(() => this.#fetch(query));
      if (user === userOf(authStore)) return page;
    }
  }

  async #fetch(query, failures = 0) {
    const known = Object.fromEntries(Object.entries(query).filter(([, value]) => value !== "" && value !== undefined));
    const page = await this.#hub.page({ topic: this.topic, limit: pageSize, ...known }, failures);
    if (!isPage(page, this.topic)) throw new Error("the answer is none of Herald's");
    this.#hub.expectBeats(page.beat);
    return page;
  }

  /** Delivers the messages of a page. */
  #take(page) {
    const since = this.position;
    if (!page.complete || (since && !page.epoch)) {
      this.#call(this.#options.onGap, { topic: this.topic, since, epoch: page.epoch, first: page.items[0]?.seq ?? null, head: page.head });
    }
    if (page.epoch !== this.#epoch || page.head < this.#seq) {
      this.#epoch = page.epoch;
      this.#seq = 0;
    }
    for (const message of page.items) this.#deliver(message, true);
    if (page.next) this.#seq = Math.max(this.#seq, numberOf(page.next));
  }

  /** Takes a message that came by the connection. */
  #receive(message) {
    if (this.#closed || this.isDenied || !isMessage(message, this.topic)) return;
    this.#lastLive = Math.max(this.#lastLive, message.seq);
    const isLive = this.#state === "live" && this.#connection === this.#hub.pb.realtime.clientId;
    if (isLive && message.epoch === this.#epoch) {
      this.#deliver(message, false);
      return;
    }
    if (this.#waiting.length === maxWaiting) {
      this.#waiting = [];
      this.#dropped = true;
    }
    this.#waiting.push(message);
    if (isLive) this.recover(); // another history, or none any more
  }

  #deliver(message, replayed) {
    if (this.#closed || (message.epoch && message.seq <= this.#seq)) return;
    if (message.epoch) this.#seq = message.seq;
    this.#call(this.#callback, { ...message, replayed, position: this.position });
  }

  #moveTo(position) {
    this.#epoch = position.slice(0, position.lastIndexOf(":"));
    this.#seq = numberOf(position);
  }

  #setState(state) {
    if (state === this.#state || this.#closed) return;
    this.#state = state;
    this.#call(this.#options.onState, state, this.position);
  }

  #call(f, ...args) {
    try {
      f?.(...args);
    } catch (error) {
      console.error(error); // the next message is not to suffer for it
    }
  }

  #pause(ms) {
    return new Promise((resolve) => {
      const timer = setTimeout(resolve, ms);
      this.#wake = () => {
        clearTimeout(timer);
        resolve();
      };
    });
  }
}

// Who is present on a topic, and what this client shows of its user. The members that
// were known stay until a new state is whole, unless somebody else signs in.
class Watch {
  members = new Presence(this);
  #hub;
  #target; // the topic
  #options;
  #key; // of what the server tells
  #joined = null; // the key by which the user is present; null: it only watches
  #epoch = "";
  #seq = 0;
  #state = ""; // "connecting", "live", "denied", "closed"
  #isOpen = false; // the application has its members, and its callbacks are called
  #begun = () => {}; // resolves what open waits for
  #doubts = 0; // how often it was denied since it was live
  #stateOn = ""; // the client id of the connection that the last state or count came by
  #loading = 0; // counts states; a page of an earlier one is dropped
  #next; // while a state is being loaded: the members so far, and the number of the last diff about each
  #counts = { total: 0, guests: 0 }; // as the server says
  #awaited = new Set(); // members of before a restart of the server that may not have come back yet
  #settling; // the timer
  #asked = false;
  #shown = {}; // what the server has accepted: meta, visible
  #shownFor = ""; // the user that this is about
  #wanted = {}; // changes that it has not
  #waiters = []; // who waits for these
  #renews = false; // it is to hear that the user is still here
  #sending = false;
  #nameless = ""; // a connection that the server does not take for this user's
  #renewal; // the timer
  #undo = [];

  constructor(hub, topic, options) {
    this.#hub = hub;
    this.#target = topic;
    this.topic = `@presence/${topic}`;
    this.#options = options;
    this.#key = new Key(hub.pb, this.topic, {});
    if (options.join !== false) this.#joined = this.#newJoin(options.visible !== false);
    this.#setState("connecting");
  }

  /** The SDK asks for the key again on each new connection, so a hidden user is never seen. */
  #newJoin(isVisible) {
    return Object.assign(new Key(this.#hub.pb, this.#target, isVisible ? {} : { visible: false }), { isVisible });
  }

  get isDenied() {
    return this.#state === "denied";
  }

  get #closed() {
    return this.#state === "closed";
  }

  get isForgotten() {
    return !this.#closed && (this.#key.isForgotten || (this.#joined?.isForgotten ?? false));
  }

  /** Whether it makes its user present on a topic. */
  joins(topic) {
    return !this.#closed && this.#joined !== null && this.#target === topic;
  }

  async open() {
    const { meta, visible } = this.#options;
    const first = { ...(meta !== undefined && { meta }), ...(visible === false && { visible }) };
    try {
      if (Object.keys(first).length > 0) { // before anybody sees the user without it
        await this.#persist(() => this.#put(first));
        this.#shown = first;
        this.#shownFor = userOf(this.#hub.pb.authStore);
      }
      await this.#persist(() => this.#hub.add(this));
      await this.#persist(async () => {
        this.#asked = true;
        await this.#key.subscribe((message) => this.#receive(message));
        await this.#joined?.subscribe(() => {});
      });
      await this.#firstState();
    } catch (error) {
      await this.close();
      throw error;
    }
    setTimeout(() => this.#tell(), 0); // when the application has the members
    this.#listen("pagehide", () => this.#leave(true));
    this.#listen("pageshow", (event) => event.persisted && this.renew());
    this.#listen("visibilitychange", () => globalThis.document.visibilityState === "visible" && this.renew(), globalThis.document);
  }

  /** Waits for the members, and not for ever: the connection may break now. */
  #firstState() {
    return new Promise((resolve, reject) => {
      const timer = setTimeout(resolve, firstStateWithin);
      this.#begun = (error) => {
        clearTimeout(timer);
        error ? reject(error) : resolve();
      };
      if (this.#state === "live") this.#begun();
    });
  }

  /** Tells what there is, and from now on what changes. */
  #tell() {
    this.#isOpen = true;
    this.#call(this.#options.onState, this.#state);
    if (this.#closed) return;
    if (this.members.size > 0) this.#changed([...this.members.values()], [], []);
    this.#call(this.#options.onCount, { total: this.members.total, guests: this.members.guests });
  }

  #setState(state) {
    if (state === this.#state || this.#closed) return;
    this.#state = state;
    if (this.#isOpen) this.#call(this.#options.onState, state);
    if (state !== "live") return;
    this.#begun();
    this.#doubts = 0;
  }

  #changed(join, update, leave) {
    if (this.#isOpen && join.length + update.length + leave.length > 0) this.#call(this.#options.onChange, { join, update, leave });
  }

  #listen(event, listener, target = globalThis.window) {
    if (!target?.addEventListener) return;
    target.addEventListener(event, listener);
    this.#undo.push(() => target.removeEventListener(event, listener));
  }

  #persist(f) {
    return persist(f, () => this.#closed, pause);
  }

  /** Never rejects. */
  async close() {
    if (this.#closed) return;
    this.#forget();
    this.#setState("closed");
    clearTimeout(this.#renewal);
    clearTimeout(this.#settling);
    this.#begun();
    this.#drop();
    for (const undo of this.#undo.splice(0)) undo();
    // the SDK may just close its connection, which could have been lost, for all the server knows
    const left = this.#asked && !this.#hub.joins(this.#target, this) && this.#leave(false);
    if (this.#asked) await Promise.all([this.#key, this.#joined].map((key) => key?.unsubscribe().catch(() => {})));
    await this.#hub.remove(this);
    await left;
  }

  leave() {
    return this.close();
  }

  /** Nobody is known to be present any more. */
  #forget() {
    this.#loading++;
    this.#next = undefined;
    this.#epoch = "";
    this.#awaited.clear();
    this.#counts = { total: 0, guests: 0 };
    this.#count();
    this.#replace(new Map());
    this.#tellCount();
  }

  /** Leaves sooner than when the server has waited for the connection to come back: a page that
   * goes may be loaded again, and all else is meant. */
  #leave(isUnloading, token = this.#hub.pb.authStore.token) {
    const { pb, lastClientId: clientId } = this.#hub;
    if (!clientId || !this.#joined) return;
    if (sharings.get(pb)?.isAlone === false) return; // other tabs may be present by the same connection
    const query = new URLSearchParams({ topic: this.#target, clientId, ...(isUnloading && { grace: reloadWithin }) });
    const headers = token ? { Authorization: token } : {};
    return fetch(urlOf(pb, `/api/notify/presence?${query}`), { method: "DELETE", headers, keepalive: isUnloading }).catch(() => {});
  }

  /** The SDK has subscribed on a new connection, or anew: then a state comes. */
  connected() {
    if (this.isDenied) this.#setState("connecting");
    if ("visible" in this.#shown) this.joinAs(this.#shown.visible);
    if (this.#shownFor !== this.#hub.user) this.#restore(); // a guest has signed in
  }

  disconnected() {
    if (this.#state === "live") this.#setState("connecting");
  }

  wake() {}

  /** Somebody else signs in: what was shown was about the one before, and what was told was for them. */
  userChanged(token) {
    this.#leave(false, token);
    this.disconnected();
    this.#shown = {};
    this.#drop();
    this.#forget();
    this.joinAs(this.#options.visible !== false); // before the SDK connects anew
  }

  async askAgain() {
    if (this.#closed || this.isDenied) return;
    const { user } = this.#hub;
    try {
      await this.#fetch("", 1);
    } catch (error) {
      if (user !== this.#hub.user || this.#closed) return; // that was the answer to somebody else
      if (isRefusal(error)) {
        this.#setState("denied");
        this.#begun(error);
        this.#forget();
        return;
      }
    }
    this.#hub.subscribeAfter(this.#doubts++);
  }

  /** Tells the server that the user is still here. */
  renew() {
    if (this.#closed || this.isDenied || !this.#joined) return;
    this.#renews = true;
    this.#send();
  }

  /** Shows something of the user: the last of several calls counts. */
  show(changes) {
    if (this.#closed) return Promise.resolve();
    return new Promise((resolve, reject) => {
      Object.assign(this.#wanted, changes);
      this.#waiters.push({ changes, resolve, reject });
      this.#send();
    });
  }

  /** What was wanted is not any more. */
  #drop() {
    this.#wanted = {};
    for (const { resolve } of this.#waiters.splice(0)) resolve();
  }

  async #send() {
    if (this.#sending) return;
    this.#sending = true;
    for (let failures = 0; !this.#closed && (this.#waiters.length > 0 || this.#renews); ) {
      const { user } = this.#hub;
      const { clientId } = this.#hub.pb.realtime;
      const wanted = this.#wanted;
      const waiters = this.#waiters;
      this.#wanted = {};
      this.#waiters = [];
      this.#renews = false;
      const finish = (isOver, how) => {
        for (const waiter of waiters.splice(0)) isOver(waiter) ? how(waiter) : waiters.push(waiter);
      };
      const again = () => {
        this.#wanted = { ...wanted, ...this.#wanted };
        this.#waiters = [...waiters, ...this.#waiters];
        this.#renews = true;
      };
      try {
        await this.#put(wanted);
        if (user === this.#hub.user) {
          this.#shownFor = user;
          Object.assign(this.#shown, wanted);
          if ("visible" in wanted) this.#hub.joinAs(this.#target, wanted.visible);
        }
        finish(() => true, ({ resolve }) => resolve());
        failures = 0;
      } catch (error) {
        const { data } = error.response ?? {};
        if (user !== this.#hub.user) {
          finish(() => true, ({ resolve }) => resolve());
        } else if (isRefusal(error) && data.clientId && this.#nameless !== clientId) {
          this.#nameless = clientId;
          again();
        } else if (isRefusal(error) && data.meta) {
          finish(({ changes }) => "meta" in changes, ({ reject }) => reject(error));
          if (wanted.meta === this.#shown.meta) delete this.#shown.meta;
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
    this.#sending = false;
    if (this.#closed) this.#drop();
  }

  /** Makes the user begin as visible, or not, on the next connection. The SDK has what it will ask
   * for then when this returns; whether it can tell the server now does not matter. */
  joinAs(isVisible) {
    const before = this.#joined;
    if (this.#closed || !before || before.isVisible === isVisible) return;
    this.#joined = this.#newJoin(isVisible);
    this.#joined.subscribe(() => {}, true).catch(() => {});
    before.unsubscribe().catch(() => {});
  }

  /** The server may have forgotten what was shown: it has started anew, or the user was away for too long. */
  #restore() {
    const { meta, visible } = this.#shown;
    const changes = { ...(meta !== undefined && { meta }), ...(visible === false && { visible }), ...this.#wanted };
    if (!this.#hub.user || Object.keys(changes).length === 0) return;
    const own = [...this.members].find(([user]) => this.#isOwn(user))?.[1];
    // what a member with other connections shows was set by one of these since
    if (!own || (own.meta === null && own.connections === 1)) this.show(changes).catch(() => {});
  }

  #isOwn(user) {
    const [, id] = this.#hub.user.split(":"); // of the record, which no other collection has
    return id !== undefined && user.endsWith(`:${id}`);
  }

  #put(changes) {
    const { pb } = this.#hub;
    const { clientId } = pb.realtime;
    const isNamed = clientId && clientId !== this.#nameless && this.#asked && this.#joined;
    if (!pb.authStore.token) { // guests are only counted
      if (!isNamed) return;
      changes = {};
    }
    return this.#request({ method: "PUT", fetch: fetchNoContent, body: { topic: this.#target, ...changes, ...(isNamed && { clientId }) } });
  }

  /** The browser may send it on a connection that is dead. */
  async #request(options) {
    const { signal, done } = timeout(submitWithin);
    try {
      return await this.#hub.pb.send("/api/notify/presence", { requestKey: null, signal, ...options });
    } finally {
      done();
    }
  }

  #fetch(cursor, limit) {
    return this.#request({ query: { topic: this.#target, cursor, limit } });
  }

  #receive(message) {
    if (this.#closed || !isObject(message) || typeof message.epoch !== "string" || !Number.isInteger(message.seq)) return;
    const { clientId } = this.#hub.pb.realtime;
    const isFirst = this.#stateOn !== clientId; // on this connection
    if (message.type === "diff" && (message.epoch !== this.#epoch || message.seq <= this.#seq)) return;
    const isRestarted = this.#epoch !== "" && message.epoch !== this.#epoch;
    this.#counts = { total: message.total, guests: message.guests };
    this.#epoch = message.epoch;
    this.#seq = message.seq;
    this.#count();
    switch (message.type) {
      case "state":
        if (!Array.isArray(message.members)) return;
        this.#stateOn = clientId;
        this.#renewEvery(message.renew);
        this.#begin(message, isFirst, isRestarted);
        break;
      case "count":
        this.#stateOn = clientId;
        this.#renewEvery(message.renew);
        this.#loading++;
        this.#next = undefined;
        this.#awaited.clear();
        this.#replace(new Map());
        this.#setState("live");
        if (isFirst) this.#restore();
        break;
      case "diff":
        this.#apply(message);
        if (message.join?.some(({ user }) => this.#isOwn(user))) this.#restore(); // it was away
        break;
    }
    this.#tellCount();
  }

  #count() {
    const { total, guests } = this.#counts;
    this.members.total = this.#awaited.size > 0 ? Math.max(total, this.members.size) : total;
    this.members.guests = guests;
  }

  #tellCount() {
    const { total, guests } = this.members;
    if (this.#isOpen) this.#call(this.#options.onCount, { total, guests });
  }

  /** A state begins; its other pages are fetched. */
  async #begin(state, isFirst, isRestarted) {
    const loading = ++this.#loading;
    if (isRestarted) { // and the others are on their way back, too
      for (const user of this.members.keys()) this.#awaited.add(user);
      clearTimeout(this.#settling);
      this.#settling = setTimeout(() => this.#settle(), backWithin);
    }
    this.#next = { members: new Map(state.members.map((member) => [member.user, member])), touched: new Map() };
    const isOver = () => loading !== this.#loading || this.#closed;
    // one that comes without being asked for comes to all watchers at once
    if (state.next && !isFirst) await pause(Math.random() * 2000);
    for (let cursor = state.next, failures = 0; cursor && !isOver(); ) {
      let page;
      try {
        page = await this.#fetch(cursor, 1000);
      } catch (error) {
        if (isRefusal(error) && !isOver()) return this.askAgain();
      }
      if (isOver()) return;
      if (!isObject(page) || !Array.isArray(page.members) || typeof page.next !== "string" || page.epoch !== this.#epoch) {
        await pause(backoff(failures++));
        continue;
      }
      for (const member of page.members) {
        if (!(this.#next.touched.get(member.user) > page.seq)) this.#next.members.set(member.user, member);
      }
      cursor = page.next;
    }
    if (isOver()) return;
    const { members } = this.#next;
    this.#next = undefined;
    for (const user of [...this.#awaited]) {
      if (members.has(user)) this.#awaited.delete(user);
      else members.set(user, this.members.get(user));
    }
    this.#replace(members);
    this.#count();
    this.#setState("live");
    this.#restore();
  }

  /** After a restart, members that have not come back have left. */
  #settle() {
    const leave = [...this.#awaited].filter((user) => this.members.has(user));
    this.#awaited.clear();
    this.members.change([], [], leave);
    this.#count();
    this.#changed([], [], leave);
    if (leave.length > 0) this.#tellCount();
  }

  #apply({ seq, join = [], update = [], leave = [] }) {
    if (this.#next) {
      for (const member of [...join, ...update]) this.#next.members.set(member.user, member);
      for (const user of leave) this.#next.members.delete(user);
      for (const user of [...[...join, ...update].map(({ user }) => user), ...leave]) this.#next.touched.set(user, seq);
      return;
    }
    const isBack = ({ user }) => this.#awaited.has(user);
    const [back, others] = [join.filter(isBack), join.filter((member) => !isBack(member))];
    for (const user of [...back.map(({ user }) => user), ...leave]) this.#awaited.delete(user);
    this.members.change(join, update, leave);
    this.#count();
    this.#changed(others, [...back, ...update], leave);
  }

  /** Makes members the ones that are present, and tells what that changes. */
  #replace(members) {
    const before = this.members;
    const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);
    const join = [...members.values()].filter(({ user }) => !before.has(user));
    const update = [...members.values()].filter((member) => before.has(member.user) && !same(before.get(member.user), member));
    const leave = [...before.keys()].filter((user) => !members.has(user));
    before.change(join, update, leave);
    this.#changed(join, update, leave);
  }

  /** seconds is undefined where nobody has to renew. */
  #renewEvery(seconds) {
    clearTimeout(this.#renewal);
    if (!(seconds > 0)) return;
    this.#renewal = setTimeout(() => {
      if (globalThis.document?.visibilityState !== "hidden") this.renew();
      this.#renewEvery(seconds);
    }, seconds * 1000 * (0.7 + 0.3 * Math.random())); // not all at once
  }

  #call(f, ...args) {
    try {
      f?.(...args);
    } catch (error) {
      console.error(error);
    }
  }
}

/** See herald.d.ts. */
class Presence extends Map {
  #watch;
  total = 0;
  guests = 0;

  constructor(watch) {
    super();
    this.#watch = watch;
  }

  async set(meta) {
    if (meta !== undefined && JSON.stringify(meta) === undefined) throw new TypeError("herald.js: meta must be JSON"); // a circle throws, too
    return this.#watch.show({ meta: meta ?? null });
  }

  hide() {
    return this.#watch.show({ visible: false });
  }

  show() {
    return this.#watch.show({ visible: true });
  }

  leave() {
    return this.#watch.leave();
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

const backoff = (failures) => Math.min(10_000, 300 * 2 ** failures) * (0.5 + Math.random() / 2); // ms

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
  #subscriptions = new Set();
  #opening = null;
  #keys = []; // of its own subscriptions
  #undo = []; // what close has to undo
  #turn = Promise.resolve(); // of subscribeAgain, one after another
  #queued = 0; // those that have not begun
  #running = false;
  #submitting = false; // by submitAgain, or a moment ago
  #every = 0; // ms between two beats; 0: none are expected
  #silent = 0; // connections in a row that have never beaten
  #beaten = false; // this one has
  #overdue; // the timer
  user = ""; // who is signed in
  #token = ""; // of that user
  connection = ""; // the client id under which the SDK has subscribed; empty: it has not

  #wanted = []; // pages that are asked for
  #isOlder = false; // the server answers for one topic at a time
  #clientIds = []; // of the connections that the user has had, the last ones

  constructor(pb) {
    this.pb = pb;
  }

  /** The connections so far, for the history: what was sent to one of them was for this client, and what left one out was not. */
  get clientIds() {
    const { clientId } = this.pb.realtime;
    if (clientId && lastOf(this.#clientIds) !== clientId) this.#clientIds = [...this.#clientIds.slice(1 - maxClientIds), clientId];
    return this.#clientIds.join(",");
  }

  /** A page of the history. Those that are asked for at once come by one request. */
  page(query, failures) {
    return new Promise((resolve, reject) => {
      this.#wanted.push({ query, failures, resolve, reject });
      if (this.#wanted.length === 1) Promise.resolve().then(() => this.#fetchWanted());
    });
  }

  #fetchWanted() {
    for (const all = this.#wanted.splice(0); all.length > 0; ) {
      const some = all.splice(0, this.#isOlder ? 1 : maxPages);
      this.#fetchPages(some).catch((error) => {
        // a server without this route, by PocketBase's own answer: one by one, then
        if (some.length > 1 && error.status === 404 && error.response?.status === 404) this.#isOlder = true;
        for (const { reject } of some) reject(error);
      });
    }
  }

  async #fetchPages(all) {
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
    return this.pb.realtime.clientId || lastOf(this.#clientIds);
  }

  async add(subscription) {
    this.#subscriptions.add(subscription);
    this.#opening = this.#opening || this.#open();
    try {
      await this.#opening;
    } catch (error) {
      await this.#close();
      throw error;
    }
  }

  async remove(subscription) {
    this.#subscriptions.delete(subscription);
    if (this.#subscriptions.size === 0 && this.#opening) await this.#close();
  }

  async #close() {
    this.#opening = null;
    this.connection = "";
    clearTimeout(this.#overdue);
    for (const undo of this.#undo.splice(0)) undo();
    await Promise.all(this.#keys.splice(0).map((key) => key.unsubscribe().catch(() => {})));
  }

  /** All of a user's watches of a topic show the same. */
  joinAs(topic, isVisible) {
    this.#each((subscription) => subscription.joins?.(topic) && subscription.joinAs(isVisible));
  }

  /** Whether another subscription than one makes its user present on a topic. */
  joins(topic, one) {
    return [...this.#subscriptions].some((subscription) => subscription !== one && subscription.joins?.(topic));
  }

  #each(f) {
    for (const subscription of [...this.#subscriptions]) f(subscription);
  }

  async #open() {
    const { realtime, authStore } = this.pb;
    this.user = userOf(authStore);
    this.#token = authStore.token;
    const before = realtime.isConnected ? realtime.clientId : "";
    const disconnect = realtime.onDisconnect;
    const onDisconnect = (topics) => {
      this.#disconnected();
      return disconnect?.(topics);
    };
    realtime.onDisconnect = onDisconnect; // the SDK has it since 0.23
    this.#undo.push(() => {
      if (realtime.onDisconnect === onDisconnect) realtime.onDisconnect = disconnect;
    });
    for (const name of ["unsubscribe", "unsubscribeByPrefix"]) this.#watch(realtime, name);
    this.#undo.push(authStore.onChange(() => this.#authChanged()));
    this.#listen(globalThis, "online", () => true);
    this.#listen(globalThis.document, "visibilitychange", () => document.visibilityState === "visible");

    // The SDK (0.28) stops trying where a connection breaks while it subscribes on it:
    // then it clears the timer of its next try. To subscribe makes it try again.
    const timer = setInterval(() => {
      cancelStale(this.pb);
      if (this.connection && this.connection !== realtime.clientId) this.#disconnected();
      if (!this.connection && !this.#running) this.subscribeAgain();
    }, watchEvery);
    this.#undo.push(() => clearInterval(timer));

    await this.#subscribe();
    // there was a connection already, of which nobody tells
    if (before && before === realtime.clientId) this.#connected(before);
  }

  async #subscribe() {
    const { realtime } = this.pb;
    const listeners = {
      PB_CONNECT: () => {
        if (!realtime.clientId) return this.subscribeAgain(); // see above
        this.#connected(realtime.clientId);
        this.#each((subscription) => subscription.connected(this.connection));
      },
      "@denied": ({ topic }) => this.#each((subscription) => topic === subscription.topic && subscription.askAgain()),
      "@beat": ({ every }) => {
        this.#beaten = true;
        this.#silent = 0;
        this.expectBeats(every);
        this.#awaitBeat();
      },
    };
    const keys = Object.keys(listeners).map((topic) => new Key(this.pb, topic, {}));
    this.#keys.push(...keys);
    await Promise.all(keys.map((key) => key.subscribe(listeners[key.topic])));
  }

  #connected(id) {
    this.connection = id;
    this.clientIds; // keeps it
    this.#beaten = false;
    this.#awaitBeat();
  }

  #disconnected() {
    this.connection = "";
    clearTimeout(this.#overdue);
    this.#each((subscription) => subscription.disconnected());
  }

  /** The server says how often it beats, in seconds; 0: never. */
  expectBeats(every) {
    if (typeof every === "number" && every >= 0) this.#every = every * 1000;
  }

  #awaitBeat() {
    clearTimeout(this.#overdue);
    const id = this.connection;
    // one beat may be late, as timers are in a tab behind others
    const ms = this.#beaten ? 2.5 * this.#every : Math.min(600_000, firstBeatWithin * 2 ** this.#silent);
    if (!id || (this.#every === 0 && this.#beaten)) return;
    this.#overdue = setTimeout(() => {
      if (id !== this.connection || this.#every === 0) return;
      // more and more seldom: one whose client a hook of the application has wrapped never beats
      if (!this.#beaten) this.#silent++;
      kick(this.pb, id);
    }, ms);
  }

  /** Notices when the application ends subscriptions by a call of the SDK. */
  #watch(realtime, name) {
    const isOwn = Object.prototype.hasOwnProperty.call(realtime, name);
    const original = realtime[name];
    const watching = (...args) => {
      const result = original.apply(realtime, args); // it forgets at once, and then tells the server
      this.#forget();
      return result;
    };
    realtime[name] = watching;
    this.#undo.push(() => {
      if (realtime[name] !== watching) return;
      if (isOwn) realtime[name] = original;
      else delete realtime[name];
    });
  }

  /** Closes the subscriptions that the SDK has forgotten. */
  #forget() {
    const forgotten = [...this.#subscriptions].filter((subscription) => subscription.isForgotten);
    for (const subscription of forgotten) this.#subscriptions.delete(subscription);
    if (this.#subscriptions.size === 0) this.#close(); // at once: the application may subscribe anew
    for (const subscription of forgotten) subscription.close();
    if (this.#subscriptions.size === 0 || !this.#keys.some((key) => key.isForgotten)) return;
    // only those of the hub were meant, such as all of PB_CONNECT
    for (const key of this.#keys.splice(0)) key.unsubscribe().catch(() => {});
    this.#subscribe().catch(() => this.subscribeAgain());
  }

  #listen(target, event, isBack) {
    if (!target?.addEventListener) return;
    const listener = () => isBack() && this.#each((subscription) => subscription.wake());
    target.addEventListener(event, listener);
    this.#undo.push(() => target.removeEventListener(event, listener));
  }

  kick(connection) {
    kick(this.pb, connection);
  }

  #authChanged() {
    const [before, token] = [this.user, this.#token];
    this.user = userOf(this.pb.authStore);
    this.#token = this.pb.authStore.token;
    const { clientId } = this.pb.realtime;
    if (before && before !== this.user) this.#clientIds = [];
    if (before === this.user) {
      // a renewed token, which may be let in
      if ([...this.#subscriptions].some(({ isDenied }) => isDenied)) this.subscribeAgain();
    } else if (before && clientId) {
      // What is on its way on a user's connection is not for the next one, who gets
      // another connection.
      this.#each((subscription) => subscription.userChanged(token));
      kick(this.pb, clientId);
    } else {
      this.#each((subscription) => before && subscription.userChanged(token));
      this.subscribeAgain();
    }
  }

  /** Makes the SDK subscribe to all topics anew, as whoever is signed in now. */
  subscribeAgain(failures = 0) {
    if (this.#queued > 0) return; // that one will do
    this.#queued++;
    this.#turn = this.#turn.then(async () => {
      this.#queued--;
      this.#running = true;
      await this.#subscribeAgain(failures);
    }).catch(console.error).finally(() => (this.#running = false));
  }

  /** Makes the SDK send its topics again, on the connection that there is. */
  submitAgain() {
    if (this.#submitting) return;
    this.#submitting = true;
    this.#turn = this.#turn.then(async () => {
      if (this.#opening) await this.#sendTopics().catch(() => {});
      setTimeout(() => (this.#submitting = false), submitEvery);
    });
  }

  /** The server has said no, and yes when it was asked: at once for the first time, and then less and less often. */
  async subscribeAfter(doubts) {
    if (doubts > 0) await pause(backoff(doubts));
    this.subscribeAgain();
  }

  async #subscribeAgain(failures) {
    if (!this.#opening) return;
    const id = this.connection;
    try {
      await this.#sendTopics();
    } catch {
      if (this.#opening) setTimeout(() => this.#opening && this.subscribeAgain(failures + 1), backoff(failures));
      return;
    }
    if (id && id === this.connection && id === this.pb.realtime.clientId) this.#each((subscription) => subscription.connected(id));
  }

  /** The SDK sends its topics when they change, and then all of them. */
  async #sendTopics() {
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
  #pb;
  #query;
  #isAsked = false; // the SDK is to know of it

  constructor(pb, topic, query) {
    this.#pb = pb;
    this.topic = topic;
    this.#query = { ...query, key: ++keys };
  }

  get #name() {
    return `${this.topic}?options=${encodeURIComponent(JSON.stringify({ query: this.#query }))}`;
  }

  /** As the server has it. */
  get sentName() {
    return sharings.get(this.#pb)?.nameOf(this.#name) ?? this.#name;
  }

  /** Somebody else has taken it away from the SDK. */
  get isForgotten() {
    const { subscriptions } = this.#pb.realtime;
    return this.#isAsked && isObject(subscriptions) && !(subscriptions[this.#name]?.length > 0);
  }

  /** Where it fails, the SDK forgets it again, unless it is to keep it for its next connection. */
  async subscribe(listener, keeps = false) {
    try {
      const asked = this.#pb.realtime.subscribe(this.topic, listener, { query: this.#query });
      this.#isAsked = true;
      await this.#bounded(asked);
    } catch (error) {
      if (!keeps) await this.unsubscribe().catch(() => {});
      throw error;
    }
  }

  unsubscribe() {
    this.#isAsked = false;
    return this.#bounded(this.#pb.realtime.unsubscribe(this.#name));
  }

  /** The SDK waits for an answer for ever, and sends no other request before it. */
  async #bounded(promise) {
    const { clientId } = this.#pb.realtime;
    const timer = setTimeout(() => {
      kick(this.#pb, clientId);
      cancelStale(this.#pb);
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
const askEvery = 15_000; // ms
const quietFor = 5000; // ms in which a stream that is said to be dead has brought nothing

// One stream for all tabs of a user. A tab leads, by a Web Lock: it has the stream, and passes
// on what comes by a BroadcastChannel. In each tab, the SDK gets an EventSource that is none,
// and its requests to subscribe go to the tab that leads, which asks for the topics of all. So the
// SDK, and what builds on it, knows nothing of this. When the tab that leads goes, the locks make
// another one lead; the SDKs of all connect anew, as after any lost connection.
class Sharing {
  tab = Math.random().toString(36).slice(2) + Date.now().toString(36);
  #pb;
  #send;
  #name = ""; // of the user's channel and lock; empty: none
  #channel;
  #leader = null; // this tab leads
  #endLead = () => {};
  #waiting; // aborts the wait for the lock
  #source = null; // that the SDK has now
  #clientId = ""; // of the stream on which the source is; empty: it waits for one
  #dead = ""; // the one before
  #names = new Map(); // the keys of the SDK, by the names under which their events come
  #requests = new Map(); // that the leader has not answered
  #lastRequest = 0;
  #silence; // the timer of an answer that is due
  #isHere; // resolves when the others can tell that this tab is there
  #undo;
  #wasAlone = false; // when it left
  #hasAsked = false; // the leader knows of the source

  constructor(pb) {
    this.#pb = pb;
    const { realtime, authStore } = pb;
    this.#send = pb.send;
    pb.send = (path, options) => {
      const { clientId, subscriptions } = (path === "/api/realtime" && options?.method === "POST" && options.body) || {};
      return clientId && clientId === this.#clientId ? this.#submit(subscriptions) : this.#send.call(pb, path, options);
    };
    const { initConnect } = realtime;
    this.#undo = () => {
      sharings.delete(pb);
      delete realtime.initConnect; // the instance's own
      pb.send = this.#send;
    };
    realtime.initConnect = () => {
      const own = Object.getOwnPropertyDescriptor(globalThis, "EventSource");
      const source = new TabSource((closed) => this.#closed(closed));
      globalThis.EventSource = function EventSource() {
        return source;
      };
      try {
        initConnect.call(realtime);
      } finally {
        if (own) Object.defineProperty(globalThis, "EventSource", own);
        else delete globalThis.EventSource;
      }
      this.#open(source);
    };
    authStore.onChange(() => {
      if (this.#nameNow() === this.#name) return;
      if (this.#source) this.#again();
      else this.#leave(); // the others go on without this tab, which would lead them with another user's token
    });
    // as long as it is held, this tab is there
    this.#isHere = new Promise((resolve) => {
      navigator.locks.request(`herald tab ${this.tab}`, () => {
        resolve();
        return new Promise(() => {});
      }).catch(() => { // not allowed here, as in a frame of no origin
        this.#undo();
        this.#again();
      });
    });
    globalThis.addEventListener?.("pagehide", () => this.#leave(true));
    globalThis.addEventListener?.("pageshow", ({ persisted }) => persisted && this.#again());
    globalThis.document?.addEventListener("resume", () => this.#again()); // it was frozen, and may have missed something
    setInterval(() => this.#clientId && !this.#leader && this.#ask({ type: "ask" }), askEvery);
    if (realtime.eventSource) kick(pb, realtime.clientId); // the connection that there is becomes the shared one
  }

  /** No other tab needs the stream. */
  get isAlone() {
    return this.#leader ? this.#leader.tabs <= 1 : this.#wasAlone;
  }

  /** Only tabs that share the SDK's store have the same token at any time, and so the same rights. */
  #nameNow() {
    const { authStore, baseURL = this.#pb.baseUrl } = this.#pb;
    return `herald ${new URL(baseURL, globalThis.location?.href)} ${storageOf(authStore) ?? this.tab} ${userOf(authStore)}`;
  }

  /** Makes the SDK connect anew. While it connects for the first time, a failure would be final. */
  #again() {
    if (this.#clientId) this.#source?.fail();
    else if (this.#source) this.#pb.realtime.initConnect();
  }

  /** The SDK connects. */
  #open(source) {
    this.#source = source;
    this.#clientId = "";
    this.#hasAsked = false;
    this.#names.clear();
    const name = this.#nameNow();
    if (name !== this.#name) {
      this.#leave();
      this.#enter(name);
    }
    this.#hello();
  }

  async #hello() {
    const source = this.#source;
    await this.#isHere;
    if (!source || source !== this.#source || this.#clientId) return;
    this.#hasAsked = true;
    this.#ask({ type: "hello", dead: this.#dead });
  }

  #enter(name) {
    this.#name = name;
    this.#wasAlone = false;
    this.#dead = "";
    const channel = new BroadcastChannel(name);
    this.#channel = channel;
    channel.onmessage = ({ data }) => channel === this.#channel && this.#receive(data);
    this.#wait({});
  }

  /** Waits for the lock, or steals it from a tab that does not answer. */
  #wait(options) {
    const name = this.#name;
    const waiting = options.steal ? undefined : new AbortController();
    this.#waiting?.abort();
    this.#waiting = waiting;
    navigator.locks.request(name, { ...options, ...(waiting && { signal: waiting.signal }) }, () => {
      if (name !== this.#name || waiting?.signal.aborted) return;
      return new Promise((resolve) => {
        this.#endLead = resolve;
        this.#lead();
      });
    }).catch(() => {
      // taken away while this tab was frozen, or not wanted any more
      if (name !== this.#name || waiting?.signal.aborted || !this.#leader) return;
      this.#resign();
      this.#wait({});
      this.#source?.fail();
    });
  }

  #lead() {
    clearTimeout(this.#silence);
    this.#waiting = undefined;
    this.#leader = new Leader(this.#pb, this.#send, (message) => this.#post(message));
    const isLate = this.#clientId !== "";
    this.#post({ type: "leads" });
    if (isLate) this.#source?.fail(); // its stream has gone with the tab that led
    else this.#hello();
  }

  #resign() {
    this.#leader?.close();
    this.#leader = null;
    this.#endLead();
  }

  /** Leaves the tabs of a user. */
  #leave(isUnloading = false) {
    if (!this.#name) return;
    this.#wasAlone = this.isAlone;
    this.#post({ type: "bye", tab: this.tab, isUnloading });
    clearTimeout(this.#silence);
    this.#name = "";
    this.#waiting?.abort();
    this.#waiting = undefined;
    this.#resign();
    this.#channel.close();
    this.#clientId = "";
    this.#settle();
  }

  /** The SDK has closed its connection. */
  #closed(source) {
    if (source !== this.#source) return;
    this.#source = null;
    this.#dead = source.isGivenUp ? this.#clientId : "";
    this.#clientId = "";
    this.#settle(!source.hasFailed); // then it has cancelled its requests
    this.#post({ type: "bye", tab: this.tab });
  }

  #post(message) {
    if (!this.#name) return;
    this.#channel.postMessage(message);
    this.#receive(message); // a channel does not bring what a tab itself has sent
  }

  /** Sends what the leader has to answer at once. */
  #ask(message) {
    clearTimeout(this.#silence);
    const name = this.#name;
    this.#silence = setTimeout(() => {
      if (name === this.#name && !this.#leader) this.#wait({ steal: true });
    }, answerWithin * (1 + Math.random())); // not all tabs at once
    this.#post({ ...message, tab: this.tab });
  }

  #submit(keys) {
    this.#names = new Map(keys.map((key) => [this.nameOf(key), key]));
    return new Promise((resolve, reject) => {
      const id = ++this.#lastRequest;
      this.#requests.set(id, { resolve, reject });
      this.#ask({ type: "keys", id, clientId: this.#clientId, names: [...this.#names.keys()], token: this.#pb.authStore.token });
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
  #settle(isAbort = false) {
    for (const { reject } of this.#requests.values()) reject(Object.assign(new Error("the connection is lost"), { status: 0, isAbort }));
    this.#requests.clear();
  }

  #receive(message) {
    const { type, to } = message;
    if (this.#leader?.receive(message)) return;
    if (to !== undefined && to !== this.tab) return;
    switch (type) {
      case "leads": // another one than before
        if (this.#leader) return;
        clearTimeout(this.#silence);
        if (this.#clientId) this.#source?.fail();
        else this.#hello();
        break;
      case "here":
        clearTimeout(this.#silence);
        break;
      case "up":
        if (!this.#source || this.#clientId || !this.#hasAsked) return;
        this.#clientId = message.clientId;
        this.#source.dispatch("PB_CONNECT", message);
        break;
      case "down":
        if (this.#clientId === message.clientId) this.#source?.fail();
        break;
      case "answer": {
        clearTimeout(this.#silence);
        const request = this.#requests.get(message.id);
        this.#requests.delete(message.id);
        if (message.error) request?.reject(Object.assign(new Error(message.error.message), message.error, { data: message.error.response }));
        else request?.resolve({});
        break;
      }
      case "event":
        if (message.clientId === this.#clientId && this.#names.has(message.name)) this.#source?.dispatch(this.#names.get(message.name), message);
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
  hasFailed = false;
  isGivenUp = false; // by the SDK's user, who has heard nothing for too long
  #onerror = null;
  #listeners = new Map();
  #onClose;
  #isOver = false;

  constructor(onClose) {
    this.#onClose = onClose;
  }

  get onerror() {
    return () => {
      this.isGivenUp = true;
      this.fail();
    };
  }

  set onerror(listener) {
    this.#onerror = listener;
  }

  addEventListener(name, listener) {
    if (!this.#listeners.has(name)) this.#listeners.set(name, new Set());
    this.#listeners.get(name).add(listener);
  }

  removeEventListener(name, listener) {
    this.#listeners.get(name)?.delete(listener);
  }

  dispatch(type, { data, id }) {
    for (const listener of [...(this.#listeners.get(type) ?? [])]) {
      if (this.#isOver) return;
      try {
        listener({ type, data, lastEventId: id });
      } catch (error) {
        console.error(error);
      }
    }
  }

  /** The connection is lost. */
  fail() {
    if (this.#isOver) return;
    this.hasFailed = true;
    this.#onerror?.({ type: "error" });
  }

  close() {
    this.#isOver = true;
    this.#onClose(this);
  }
}

// The stream, and the topics of all tabs.
class Leader {
  #pb;
  #send;
  #post;
  #source = null;
  #clientId = "";
  #tabs = new Map(); // the names that each tab wants
  #parting = new Set(); // those of tabs that have just gone
  #turn = Promise.resolve(); // of requests, one after another
  #failures = 0;
  #opening; // the timer
  #heard = 0; // when something came
  #known = new Set(); // the tabs whose end is awaited
  #isClosed = false;
  #listened = new Set(); // names
  #token = ""; // that the server has accepted

  constructor(pb, send, post) {
    this.#pb = pb;
    this.#send = send;
    this.#post = post;
  }

  get tabs() {
    return this.#tabs.size;
  }

  /** Takes a message that is for the tab that leads. */
  receive({ type, tab, dead, id, clientId, names, token, isUnloading }) {
    switch (type) {
      case "hello":
        this.#post({ type: "here", to: tab });
        this.#hello(tab, dead);
        return true;
      case "ask":
        this.#post(this.#tabs.has(tab) ? { type: "here", to: tab } : { type: "leads", to: tab });
        return true;
      case "keys":
        this.#post({ type: "here", to: tab });
        this.#turn = this.#turn.then(() => this.#submit(tab, clientId, names, token, id));
        return true;
      case "bye":
        this.#bye(tab, isUnloading);
        return true;
    }
    return false;
  }

  #hello(tab, dead) {
    // the tab noticed before this one, which may be in the background
    if (dead && dead === this.#clientId && Date.now() - this.#heard > quietFor) this.#fail();
    this.#tabs.set(tab, []);
    this.#awaitEnd(tab);
    if (this.#clientId) this.#announce(tab);
    else if (!this.#source && !this.#opening) this.#openLater();
  }

  /** A tab that ends without a word gives its lock back. */
  #awaitEnd(tab) {
    if (this.#known.has(tab)) return;
    this.#known.add(tab);
    navigator.locks.request(`herald tab ${tab}`, { mode: "shared" }, () => {}).then(() => {
      this.#known.delete(tab);
      if (!this.#isClosed) this.#bye(tab, true);
    }, () => {});
  }

  /** A page that goes may be loaded again: until then its user stays where they are present. */
  #bye(tab, isUnloading) {
    const names = this.#tabs.get(tab);
    if (!this.#tabs.delete(tab)) return;
    if (this.#tabs.size === 0) return this.#disconnect();
    if (names.length === 0) return;
    const forget = () => {
      this.#parting.delete(names);
      this.#turn = this.#turn.then(() => this.#request().catch(() => {}));
    };
    if (!isUnloading) return forget();
    this.#parting.add(names);
    setTimeout(forget, reloadWithin * 1000);
  }

  #openLater() {
    this.#opening = setTimeout(() => {
      this.#opening = undefined;
      this.#open();
    }, this.#failures && backoff(this.#failures - 1));
  }

  #open() {
    const source = new EventSource(urlOf(this.#pb, "/api/realtime"));
    this.#source = source;
    this.#listened.clear();
    source.onerror = () => source === this.#source && this.#fail();
    source.addEventListener("PB_CONNECT", ({ lastEventId: id }) => {
      if (source !== this.#source) return;
      this.#clientId = id;
      this.#failures = 0;
      this.#heard = Date.now();
      this.#announce();
    });
  }

  /** Tells a tab, or all, that the stream is there, as PB_CONNECT does. */
  #announce(to) {
    const id = this.#clientId;
    this.#post({ type: "up", to, clientId: id, data: JSON.stringify({ clientId: id }), id });
  }

  #disconnect() {
    clearTimeout(this.#opening);
    this.#opening = undefined;
    this.#parting.clear();
    this.#source?.close();
    this.#source = null;
    this.#clientId = "";
  }

  #fail() {
    const clientId = this.#clientId;
    this.#disconnect();
    this.#failures++;
    if (clientId) {
      this.#tabs.clear();
      this.#post({ type: "down", clientId });
    } else if (this.#tabs.size > 0) {
      this.#openLater();
    }
  }

  /** Subscribes for a tab. It is answered as the SDK would have been. */
  async #submit(tab, clientId, names, token, id) {
    const before = this.#tabs.get(tab);
    let error;
    if (!before || clientId !== this.#clientId) {
      error = { message: "the connection is lost", status: 0 };
    } else {
      this.#tabs.set(tab, names);
      try {
        await this.#request(token);
        this.#token = token;
      } catch ({ message, status, response }) {
        error = { message, status, response };
        if (this.#clientId === clientId && this.#tabs.get(tab) === names) this.#tabs.set(tab, before);
      }
    }
    this.#post({ type: "answer", to: tab, id, error });
  }

  /** Asks for the topics of all tabs. */
  async #request(token = this.#token) {
    const clientId = this.#clientId;
    if (!clientId) return;
    const names = [...new Set([...this.#tabs.values(), ...this.#parting].flat())];
    for (const name of names) this.#listen(name);
    const { signal, done } = timeout(submitWithin);
    try {
      await this.#send.call(this.#pb, "/api/realtime", {
        method: "POST", body: { clientId, subscriptions: names }, headers: { Authorization: token }, requestKey: null, signal,
      });
    } finally {
      done();
    }
  }

  #listen(name) {
    if (this.#listened.has(name) || name.split("?")[0] === "PB_CONNECT") return;
    this.#listened.add(name);
    const source = this.#source;
    source.addEventListener(name, ({ data, lastEventId: id }) => {
      if (source !== this.#source) return;
      this.#heard = Date.now();
      this.#post({ type: "event", clientId: this.#clientId, name, data, id });
    });
  }

  close() {
    this.#isClosed = true;
    this.#tabs.clear();
    this.#disconnect();
  }
}
