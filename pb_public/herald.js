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

const pageSize = 500;
const maxWaiting = 1000; // messages; more can be fetched
const kickAfter = 3000; // ms
const watchEvery = 5000; // ms

/** See herald.d.ts. */
export async function subscribe(pb, topic, callback, options = {}) {
  const subscription = new Subscription(hubOf(pb), topic, callback, options);
  await subscription.open();
  return () => subscription.close();
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
        this.#take(await this.#fetch({ rewind }));
      } else {
        const { epoch, head } = await this.#fetch({ limit: 1 });
        this.#moveTo(`${epoch}:${head}`);
      }
      await this.#hub.add(this);
      const before = this.#hub.connection;
      this.#asked = true;
      await this.#key.subscribe((message) => this.#receive(message));
      // else the SDK is about to connect, and PB_CONNECT comes after it has subscribed
      if (before && before === this.#hub.connection) this.#connection = before;
    } catch (error) {
      await this.close().catch(() => {});
      throw error;
    }
    this.recover();
  }

  async close() {
    if (this.#closed) return;
    this.#setState("closed");
    this.#waiting = [];
    this.#wake();
    try {
      if (this.#asked) await this.#key.unsubscribe();
    } finally {
      await this.#hub.remove(this);
    }
  }

  /** The SDK has subscribed to all topics, on a new connection or anew. */
  connected(id) {
    if (!this.#asked) return;
    if (this.isDenied) this.#setState("connecting");
    this.#connection = id;
    this.#lastLive = 0;
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
    try {
      await this.#fetch({ limit: 1 });
    } catch (error) {
      if (isRefusal(error)) return this.#denied();
    }
    this.#hub.subscribeAgain();
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

  /** Fetches what was missed, and goes live where the connection is up. */
  async recover() {
    this.#again = true;
    if (this.#recovering || this.#closed) return;
    this.#recovering = true;
    try {
      await this.#recover();
    } finally {
      this.#recovering = false;
    }
  }

  async #recover() {
    for (let failures = 0; !this.#closed; ) {
      this.#setState("recovering");
      this.#again = this.#dropped = false;
      const connection = this.#connection;
      let page;
      try {
        page = await this.#fetch({ since: this.position }, failures);
        failures = 0;
      } catch (error) {
        if (this.#isOver) return;
        if (isRefusal(error)) {
          if (this.#again && connection !== this.#connection) continue; // signed in meanwhile
          return this.#denied();
        }
        await this.#pause(backoff(failures++));
        if (this.#isOver) return;
        continue;
      }
      if (this.#isOver) return;
      this.#take(page);
      if (this.#isOver) return;
      if (page.epoch && page.next !== `${page.epoch}:${page.head}`) continue;
      if (this.#again || this.#dropped) continue;
      if (!connection || connection !== this.#hub.pb.realtime.clientId) {
        this.#setState("connecting"); // PB_CONNECT comes, and with it recover
        return;
      }
      this.#setState("live");
      for (const message of this.#waiting.splice(0)) this.#receive(message);
      if (!this.#again) return;
    }
  }

  /** There is nothing to recover: it was closed, or denied and nothing came after. */
  get #isOver() {
    return this.#closed || (this.isDenied && !this.#again);
  }

  #fetch(query, failures = 0) {
    const known = Object.fromEntries(Object.entries(query).filter(([, value]) => value !== "" && value !== undefined));
    return this.#hub.pb.send("/api/notify/history", {
      query: { topic: this.topic, limit: pageSize, ...known },
      requestKey: null,
      // the browser may have sent it on a connection that is dead
      signal: AbortSignal.timeout(Math.min(30, 5 + 5 * failures) * 1000),
    });
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
    if (this.#closed || this.isDenied) return;
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

const backoff = (failures) => Math.min(10_000, 300 * 2 ** failures) * (0.5 + Math.random() / 2); // ms

const isRefusal = ({ status }) => status >= 400 && status < 500 && status !== 408 && status !== 429;

const numberOf = (position) => Number(position.slice(position.lastIndexOf(":") + 1)) || 0;

// What the subscriptions of one SDK client share: they are told of its connection,
// of who is signed in, and of denied topics.
class Hub {
  #subscriptions = new Set();
  #opening = null;
  #undo = []; // what close has to undo
  #user;
  #turn = Promise.resolve(); // of subscribeAgain, one after another
  #queued = 0; // those that have not begun
  #running = false;
  connection = ""; // the client id under which the SDK has subscribed; empty: it has not

  constructor(pb) {
    this.pb = pb;
  }

  async add(subscription) {
    this.#subscriptions.add(subscription);
    this.#opening ??= this.#open();
    try {
      await this.#opening;
    } catch (error) {
      await this.#close();
      throw error;
    }
  }

  async remove(subscription) {
    this.#subscriptions.delete(subscription);
    if (this.#subscriptions.size === 0) await this.#close();
  }

  async #close() {
    this.#opening = null;
    this.connection = "";
    await Promise.all(this.#undo.splice(0).map((undo) => undo()));
  }

  #each(f) {
    for (const subscription of [...this.#subscriptions]) f(subscription);
  }

  async #open() {
    const { realtime, authStore } = this.pb;
    this.#user = userOf(authStore);
    const before = realtime.isConnected ? realtime.clientId : "";
    const disconnect = realtime.onDisconnect;
    const onDisconnect = (topics) => {
      this.connection = "";
      this.#each((subscription) => subscription.disconnected());
      return disconnect?.(topics);
    };
    realtime.onDisconnect = onDisconnect;
    this.#undo.push(() => {
      if (realtime.onDisconnect === onDisconnect) realtime.onDisconnect = disconnect;
    });
    this.#undo.push(authStore.onChange(() => this.#authChanged()));
    this.#listen(globalThis, "online", () => true);
    this.#listen(globalThis.document, "visibilitychange", () => document.visibilityState === "visible");

    const [connect, denied] = [new Key(this.pb, "PB_CONNECT", {}), new Key(this.pb, "@denied", {})];
    this.#undo.push(() => Promise.all([connect.unsubscribe(), denied.unsubscribe()]));
    await Promise.all([
      connect.subscribe(() => {
        if (!realtime.clientId) return this.subscribeAgain(); // see below
        this.connection = realtime.clientId;
        this.#each((subscription) => subscription.connected(this.connection));
      }),
      denied.subscribe(({ topic }) => {
        this.#each((subscription) => topic === subscription.topic && subscription.askAgain());
      }),
    ]);
    // there was a connection already, of which nobody tells
    if (before && before === realtime.clientId) this.connection = before;

    // The SDK (0.28) stops trying where a connection breaks while it subscribes on it:
    // then it clears the timer of its next try. To subscribe makes it try again.
    const timer = setInterval(() => this.connection || this.#running || this.subscribeAgain(), watchEvery);
    this.#undo.push(() => clearInterval(timer));
  }

  #listen(target, event, isBack) {
    if (!target?.addEventListener) return;
    const listener = () => isBack() && this.#each((subscription) => subscription.wake());
    target.addEventListener(event, listener);
    this.#undo.push(() => target.removeEventListener(event, listener));
  }

  /** Makes the SDK connect anew: its connection is dead. */
  kick(connection) {
    const { realtime } = this.pb;
    if (realtime.clientId === connection) realtime.eventSource?.onerror?.(new Event("error"));
  }

  #authChanged() {
    const before = this.#user;
    this.#user = userOf(this.pb.authStore);
    const isOther = before !== this.#user;
    const affected = [...this.#subscriptions].filter((subscription) => isOther || subscription.isDenied);
    // else it is a renewed token
    if (isOther || [...this.#subscriptions].some(({ isDenied }) => isDenied)) this.subscribeAgain(before && this.#user && isOther);
  }

  /** Makes the SDK subscribe to all topics anew, as whoever is signed in now. signOut:
   * the connection is another user's. */
  subscribeAgain(signOut = false, failures = 0) {
    if (this.#queued > 0 && !signOut) return; // that one will do
    this.#queued++;
    this.#turn = this.#turn.then(async () => {
      this.#queued--;
      this.#running = true;
      await this.#subscribeAgain(signOut, failures);
    }).catch(console.error).finally(() => (this.#running = false));
  }

  async #subscribeAgain(signOut, failures) {
    if (!this.#opening) return;
    const { realtime } = this.pb;
    const id = this.connection;
    if (signOut && id) {
      // the server lets a connection change from a guest to a user, not to another user
      await fetch(this.pb.buildURL("/api/realtime"), {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify({ clientId: id, subscriptions: ["PB_CONNECT", "@denied"] }),
      }).catch(() => {});
    }
    // it sends its topics when they change, and then all of them
    const another = new Key(this.pb, "@denied", {});
    try {
      await another.subscribe(() => {});
      if (id && id === this.connection && id === realtime.clientId) this.#each((subscription) => subscription.connected(id));
    } catch {
      setTimeout(() => this.subscribeAgain(signOut, failures + 1), backoff(failures));
    }
    await another.unsubscribe().catch(() => {});
  }
}

let keys = 0;

// A subscription of the SDK that is nobody else's, by an option with a number. So it can
// be taken away also where subscribing failed: the SDK keeps the listener then.
class Key {
  #pb;
  #topic;
  #query;

  constructor(pb, topic, query) {
    this.#pb = pb;
    this.#topic = topic;
    this.#query = { ...query, key: ++keys };
  }

  async subscribe(listener) {
    try {
      await this.#pb.realtime.subscribe(this.#topic, listener, { query: this.#query });
    } catch (error) {
      await this.unsubscribe().catch(() => {});
      throw error;
    }
  }

  unsubscribe() {
    return this.#pb.realtime.unsubscribe(`${this.#topic}?options=${encodeURIComponent(JSON.stringify({ query: this.#query }))}`);
  }
}

const userOf = ({ record, isValid }) => (isValid && record ? `${record.collectionId}:${record.id}` : "");

const hubs = new WeakMap();

function hubOf(pb) {
  if (!hubs.has(pb)) hubs.set(pb, new Hub(pb));
  return hubs.get(pb);
}
