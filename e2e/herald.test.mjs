// The client module herald.js over the stock SDK, in Node: what it promises, on a
// network that fails in every way.

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { setMaxListeners } from "node:events";
import { mkdir, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { afterEach, test } from "node:test";

import { presence, subscribe } from "../clients/js/herald.js";
import OldestPocketBase from "pocketbase-oldest";

import { addUser, Herald, launchBrowser, root, send, setClockAhead, until, whereabouts } from "./kit.mjs";
import { FaultyProxy, RudeProxy } from "./proxy.mjs";

// older Safari and React Native lack these
delete AbortSignal.timeout;
delete globalThis.atob;

// as in a browser
const window = new EventTarget();
setMaxListeners(0, window);
globalThis.addEventListener = window.addEventListener.bind(window);
globalThis.removeEventListener = window.removeEventListener.bind(window);

const logs = [];
afterEach(() => Promise.all(logs.splice(0).map((log) => log.stop().catch(() => {})))); // or they try for ever

/** What a subscription of herald.js tells. */
class Log {
  messages = [];
  gaps = [];
  states = [];

  static async on(pb, topic, options = {}) {
    const log = new Log();
    log.pb = pb;
    log.stop = await subscribe(pb, topic, (message) => log.messages.push(message), {
      ...options,
      onGap: (gap) => log.gaps.push(gap),
      onState: (state, position) => log.states.push({ state, position }),
    });
    logs.push(log);
    return log;
  }

  get state() {
    return this.states.at(-1)?.state;
  }

  describe() {
    const { realtime } = this.pb;
    const known = new Set(this.messages.map(({ seq }) => seq));
    return JSON.stringify({
      messages: this.messages.length, missing: Array.from({ length: Math.max(0, ...known) }, (_, i) => i + 1).filter((seq) => !known.has(seq)),
      last: this.messages.slice(-15).map(({ seq, replayed }) => replayed ? `${seq} replayed` : seq), states: this.states.slice(-5), clientId: realtime.clientId, isConnected: realtime.isConnected,
      stream: realtime.eventSource?.readyState, attempts: realtime.reconnectAttempts, pending: realtime.pendingConnects?.length,
      keys: Object.keys(realtime.subscriptions),
    });
  }

  get data() {
    return this.messages.map(({ data }) => data);
  }

  live() {
    return until("it is live", () => this.state === "live");
  }

  /** Waits until as many messages have come. */
  async count(count) {
    await until(`${count} messages of ${this.messages.length}`, () => this.messages.length >= count);
    return this;
  }
}

const restart = async (herald, f) => {
  await herald.stop("SIGKILL");
  await f?.();
  await herald.start();
};

async function install(t, start = "start", ...args) {
  const herald = await (await Herald.install(t))[start](...args);
  const root = await herald.superuser();
  const channels = root.collection("notify_channels");
  const channel = await channels.create({ pattern: "log/{name}", subscribeRule: "*", history: 100 });
  await channels.create({ pattern: "me/{id}", subscribeRule: "@request.query.id = @request.auth.id", history: 100 });
  await channels.create({ pattern: "members/{room}", subscribeRule: '@request.auth.id != "" && @request.auth.name = "member"', history: 100 });
  return { herald, root, channels, channel };
}

test("herald.js", async (t) => {
  const { herald, root, channels, channel } = await install(t);
  const say = (topic, ...data) => data.reduce((before, d) => before.then(() => send(root, { topic, data: d })), Promise.resolve());

  await t.test("begins now, with since, and with rewind", async () => {
    await say("log/begin", 1, 2, 3);
    const pb = herald.client();
    const now = await Log.on(pb, "log/begin");
    const rewound = await Log.on(pb, "log/begin", { rewind: 2 });
    const all = await Log.on(pb, "log/begin", { rewind: "1h" });
    await now.live();
    const { position } = now.states.at(-1);
    assert.match(position, /^[a-z0-9]+:3$/);
    const since = await Log.on(herald.client(), "log/begin", { since: position.replace(":3", ":1") });
    await say("log/begin", 4);
    assert.deepEqual((await now.count(1)).data, [4]);
    assert.deepEqual((await rewound.count(3)).data, [2, 3, 4]);
    assert.deepEqual((await all.count(4)).data, [1, 2, 3, 4]);
    assert.deepEqual((await since.count(3)).data, [2, 3, 4]);
    assert.deepEqual(rewound.messages.map(({ seq, replayed }) => [seq, replayed]), [[2, true], [3, true], [4, false]]);
    const last = now.messages[0];
    assert.equal(last.position, position.replace(":3", ":4"));
    assert.deepEqual(Object.keys(last).sort(), ["data", "epoch", "from", "id", "position", "replayed", "seq", "time", "topic"]);
    assert.deepEqual([now.gaps, rewound.gaps, since.gaps], [[], [], []]);

    // a cold start, with a position that the application has kept
    await now.stop();
    assert.equal(now.state, "closed");
    await say("log/begin", 5);
    const again = await Log.on(herald.client(), "log/begin", { since: last.position });
    assert.deepEqual((await again.count(1)).data, [5]);
    assert.equal(now.messages.length, 1);
  });

  await t.test("many topics with one request", async () => {
    const topics = Array.from({ length: 12 }, (_, i) => `log/many${i}`);
    for (const topic of topics) await say(topic, "before");
    const pb = herald.client();
    const { send: original } = pb;
    const requests = [];
    pb.send = (path, options) => {
      requests.push(`${options.method ?? "GET"} ${path}`);
      return original.call(pb, path, options);
    };
    const logs = await Promise.all([...topics.map((topic, i) => Log.on(pb, topic, i === 0 ? { rewind: 1 } : {})), Log.on(herald.client(), "members/many").catch(({ status }) => status)]);
    assert.equal(logs.pop(), 403);
    await Promise.all(logs.map((log) => log.live()));
    assert.ok(requests.filter((request) => request.endsWith("history")).length <= 6, requests.join());
    // on their way back, too, with one that is denied
    const denied = assert.rejects(Log.on(pb, "members/many"), ({ status }) => status === 403);
    await denied;
    requests.length = 0;
    await herald.stop("SIGKILL");
    await herald.start();
    for (const topic of topics) await say(topic, "after");
    for (const [i, log] of logs.entries()) assert.deepEqual((await log.count(i === 0 ? 2 : 1)).data, i === 0 ? ["before", "after"] : ["after"]);
    assert.ok(requests.filter((request) => request.endsWith("history")).length <= 6, requests.join());
    await Promise.all(logs.map((log) => log.stop()));
  });

  await t.test("wrong arguments", async () => {
    const pb = herald.client();
    for (const [args, message] of [
      [["log/begin"], /callback/],
      [["", () => {}], /topic/],
      [[42, () => {}], /topic/],
      [["log/begin", () => {}, { since: "zz" }], /position/],
      [["log/begin", () => {}, { since: "epoch:1", rewind: 2 }], /exclude/],
    ]) await assert.rejects(subscribe(pb, ...args), message);
    await assert.rejects(presence(pb), /topic/);
    assert.equal(pb.realtime.clientId, "");
  });

  await t.test("restarts of the server", async () => {
    const logs = await Promise.all([1, 2, 3].map(() => Log.on(herald.client(), "log/restart")));
    const one = logs[0];
    for (let n = 0; n < 3; n++) {
      await Promise.all(logs.map((log) => log.live()));
      await say("log/restart", n * 10);
      await restart(herald);
      await say("log/restart", n * 10 + 1, n * 10 + 2); // before the clients are back
    }
    const want = [0, 1, 2, 10, 11, 12, 20, 21, 22];
    for (const log of logs) assert.deepEqual((await log.count(want.length)).data, want);
    assert.deepEqual(one.gaps, []);
    assert.ok(one.messages.some(({ replayed }) => replayed) && one.messages.some(({ replayed }) => !replayed));
  });

  await t.test("a message of one's own that left this client out, over a restart", async () => {
    await addUser(root, "self@example.com");
    await channels.create({ pattern: "self/{name}", subscribeRule: "*", publishRule: "*", history: 100 });
    const [pb, otherTab] = [await herald.signIn("self@example.com"), await herald.signIn("self@example.com")];
    const [log, other] = [await Log.on(pb, "self/a"), await Log.on(otherTab, "self/a")];
    await Promise.all([log.live(), other.live()]);
    const body = { topic: "self/a", data: "my own", self: false, clientId: pb.realtime.clientId };
    await pb.send("/api/notify/publish", { method: "POST", body });
    assert.deepEqual((await other.count(1)).data, ["my own"]);
    await restart(herald);
    await say("self/a", "after");
    assert.deepEqual((await log.count(1)).data, ["after"]);
    assert.deepEqual((await other.count(2)).data, ["my own", "after"]);
  });

  await t.test("a gap, and a history that was lost", async () => {
    const log = await Log.on(herald.client(), "log/gap");
    await log.live();
    await say("log/gap", "seen");
    await log.count(1);
    await herald.stop();
    const stopped = log.states.at(-1);
    await herald.start();
    // more than are kept, before the client asks
    await channels.update(channel.id, { history: 3 });
    const proxyless = log.messages.length;
    await log.live();
    assert.equal(proxyless, 1);
    await log.stop();
    await say("log/gap", "a", "b", "c", "d", "e");
    const late = await Log.on(herald.client(), "log/gap", { since: log.messages[0].position });
    assert.deepEqual((await late.count(3)).data, ["c", "d", "e"]);
    assert.equal(late.gaps.length, 1);
    assert.deepEqual(late.gaps[0], { topic: "log/gap", since: log.messages[0].position, epoch: log.messages[0].epoch, first: 4, head: 6 });
    assert.ok(stopped);
    await channels.update(channel.id, { history: 100 });

    await late.live();
    await herald.stop();
    await herald.loseHistory();
    await herald.start();
    await say("log/gap", "new");
    assert.deepEqual((await late.count(4)).data.at(-1), "new");
    const lost = late.gaps.at(-1);
    assert.notEqual(lost.epoch, log.messages[0].epoch);
    assert.equal(lost.since, `${log.messages[0].epoch}:6`);
    // it may have asked before there was anything new
    assert.deepEqual([lost.first, lost.head], lost.head === 0 ? [null, 0] : [1, 1]);
  });

  await t.test("a denied topic", async () => {
    const pb = herald.client();
    const user = await addUser(root, "denied@example.com");
    const other = await Log.on(pb, "log/other");
    await assert.rejects(Log.on(pb, "members/1"), (error) => error.status === 403);
    await pb.collection("users").authWithPassword("denied@example.com", "1234567890");
    await assert.rejects(Log.on(pb, "members/1"), (error) => error.status === 403);

    // let in, thrown out, and let in again
    await root.collection("users").update(user.id, { name: "member" });
    const log = await Log.on(pb, "members/1");
    await log.live();
    await say("members/1", 1);
    await log.count(1);
    await root.collection("users").update(user.id, { name: "stranger" });
    await until("it is denied", () => log.state === "denied");
    await say("members/1", 2);
    await say("log/other", "goes on");
    assert.deepEqual((await other.count(1)).data, ["goes on"]);
    assert.deepEqual(log.data, [1]);
    await root.collection("users").update(user.id, { name: "member" });
    await pb.collection("users").authRefresh();
    assert.deepEqual((await log.count(2)).data, [1, 2]);
    await log.live();
    await say("members/1", 3);
    assert.deepEqual((await log.count(3)).data, [1, 2, 3]);
    assert.deepEqual(log.gaps, []);
  });

  await t.test("sign-out, sign-in, and another user", async () => {
    const [ann, bob] = [await addUser(root, "ann@example.com", { name: "member" }), await addUser(root, "bob@example.com", { name: "member" })];
    const pb = await herald.signIn("ann@example.com");
    const mine = await Log.on(pb, `me/${ann.id}`);
    const room = await Log.on(pb, "members/2");
    await Promise.all([mine.live(), room.live()]);
    await say("members/2", 1);
    await room.count(1);
    pb.authStore.clear();
    await until("both are denied", () => mine.state === "denied" && room.state === "denied");
    await say("members/2", 2);
    await say(`me/${ann.id}`, "private");
    await pb.collection("users").authWithPassword("bob@example.com", "1234567890");
    assert.deepEqual((await room.count(2)).data, [1, 2]);
    await room.live();
    await until("Ann's is denied", () => mine.state === "denied");
    assert.deepEqual(mine.data, []);

    // from one user to another without a sign-out
    const anns = await herald.signIn("ann@example.com");
    pb.authStore.save(anns.authStore.token, anns.authStore.record);
    assert.deepEqual((await mine.count(1)).data, ["private"]);
    await mine.live();
    await room.live();
    await say("members/2", 3);
    assert.deepEqual((await room.count(3)).data, [1, 2, 3]);
    assert.ok(bob);
  });

  await t.test("an expired token", async () => {
    const users = await root.collections.getOne("users");
    await root.collections.update(users.id, { authToken: { duration: 10 } });
    t.after(() => root.collections.update(users.id, { authToken: { duration: 604800 } }).catch(() => {}));
    await addUser(root, "short@example.com", { name: "member" });
    const pb = await herald.signIn("short@example.com");
    const log = await Log.on(pb, "members/3");
    await log.live();
    await say("members/3", 1);
    await log.count(1);
    await until("it has expired", () => log.state === "denied");
    await say("members/3", 2);
    assert.deepEqual(log.data, [1]);
    await root.collections.update(users.id, { authToken: { duration: 604800 } });
    await pb.collection("users").authWithPassword("short@example.com", "1234567890");
    assert.deepEqual((await log.count(2)).data, [1, 2]);
    await log.live();
    assert.deepEqual(log.gaps, []);
  });

  await t.test("a topic without history", async () => {
    const log = await Log.on(herald.client(), "plain");
    await log.live();
    await say("plain", 1);
    assert.deepEqual((await log.count(1)).messages[0].position, "");
    await restart(herald);
    await until("it is live again", () => log.states.filter(({ state }) => state === "live").length === 2);
    await say("plain", 2);
    assert.deepEqual((await log.count(2)).data, [1, 2]);
  });

  await t.test("a callback that throws, and one that unsubscribes", async () => {
    const pb = herald.client();
    const seen = [];
    const complaints = t.mock.method(console, "error", () => {});
    const stop = await subscribe(pb, "log/throws", ({ data }) => {
      seen.push(data);
      if (data === 1) throw new Error("the application's own");
      if (data === 2) stop();
    });
    await say("log/throws", 1, 2, 3);
    const fence = await Log.on(pb, "log/throws", { rewind: 1 });
    await fence.count(1);
    assert.deepEqual(seen, [1, 2]);
    assert.equal(complaints.mock.callCount(), 1);
    complaints.mock.restore();
  });

  await t.test("a connection that is dead without knowing", async (t) => {
    const proxy = await FaultyProxy.to(herald.port);
    t.after(() => proxy.close());
    const pb = herald.client(proxy.url);
    const log = await Log.on(pb, "log/sleep");
    await log.live();
    const { clientId } = pb.realtime;
    proxy.freeze(); // as while a phone sleeps: nothing arrives, nobody is told
    await say("log/sleep", 1, 2);
    proxy.thaw({ old: false }); // the network is back, without the old connections
    assert.equal(log.messages.length, 0);
    window.dispatchEvent(new Event("online"));
    assert.deepEqual((await log.count(2)).data, [1, 2]);
    await until("there is another connection", () => pb.realtime.clientId && pb.realtime.clientId !== clientId);
    await log.live();
    await say("log/sleep", 3);
    assert.deepEqual((await log.count(3)).messages.map(({ data, replayed }) => [data, replayed]), [[1, true], [2, true], [3, false]]);
  });
});

test("herald.js behind a proxy that answers in the server's place", async (t) => {
  const { herald, root } = await install(t);
  const proxy = await RudeProxy.to(herald.port);
  t.after(() => proxy.close());
  const say = (data, topic = "log/rude") => send(root, { topic, data });

  const ways = { // a page of one topic, those of two topics in one request, subscribing
    history: { count: 1, isHit: ({ url }) => url.startsWith("/api/notify/history") },
    "history of two topics": { count: 2, isHit: ({ url }) => url.startsWith("/api/notify/history") },
    realtime: { count: 1, isHit: ({ url, method }) => url === "/api/realtime" && method === "POST" },
  };
  for (const fate of ["cut", "html", 400, 401, 403, 404, 502]) {
    for (const [way, { count, isHit }] of Object.entries(ways)) {
      if (fate === "cut" && way === "realtime") continue; // its answer has no body
      await t.test(`${fate} for ${way}`, async () => {
        const topics = Array.from({ length: count }, (_, i) => `log/${fate}-${way.length}-${i}`);
        const sayAll = (data) => Promise.all(topics.map((topic) => say(data, topic)));
        const pb = herald.client(proxy.url);
        const logs = await Promise.all(topics.map((topic) => Log.on(pb, topic)));
        const all = async (data) => {
          for (const log of logs) assert.deepEqual((await log.count(data.length)).data, data);
        };
        for (const log of logs) await log.live();
        await sayAll(1);
        await all([1]);
        let left = fate === "html" && way === "realtime" ? 1 : 3; // the SDK takes it for a success: it takes a missing beat
        const methods = new Set();
        proxy.fate = (request) => {
          if (!isHit(request) || left-- <= 0) return "pass";
          methods.add(request.method);
          return fate;
        };
        proxy.endStreams();
        await sayAll(2);
        await until("the proxy has answered for the server", () => left <= 0);
        await sayAll(3);
        await all([1, 2, 3]);
        for (const log of logs) await log.live();
        await sayAll(4);
        await all([1, 2, 3, 4]);
        assert.equal(methods.has("POST"), way !== "history", [...methods].join()); // several topics are asked for at once
        for (const log of logs) {
          assert.deepEqual(log.gaps, []);
          assert.ok(log.states.every(({ state }) => state !== "denied" && state !== "closed"));
          await log.stop();
        }
      });
    }
  }

  await t.test("while it opens", async () => {
    for (const fate of ["cut", "html", 404]) {
      let left = 2;
      proxy.fate = ({ url }) => url.startsWith("/api/notify/history") && left-- > 0 ? fate : "pass";
      await say(fate, `log/open${fate}`);
      const log = await Log.on(herald.client(proxy.url), `log/open${fate}`, { rewind: 1 });
      assert.deepEqual((await log.count(1)).data, [fate]);
      await log.stop();
    }
    proxy.fate = ({ url }) => (url.startsWith("/api/notify/history") ? 404 : "pass");
    const states = [];
    await assert.rejects(subscribe(herald.client(proxy.url), "log/never", () => {}, { onState: (state) => states.push(state) }), (error) => error.status === 404);
    assert.equal(states.at(-1), "closed");
  });
});

test("a stream that dies without an end", async (t) => {
  const herald = await (await Herald.install(t)).start("--notifyHeartbeat=1s");
  const root = await herald.superuser();
  await root.collection("notify_channels").create({ pattern: "log/{name}", subscribeRule: "*", history: 100 });
  const proxy = await RudeProxy.to(herald.port);
  t.after(() => proxy.close());
  for (const [name, SDK] of [["this SDK", undefined], ["the oldest SDK", OldestPocketBase]]) {
    await t.test(name, async () => {
      const topic = `log/${SDK ? "old" : "new"}`;
      const log = await Log.on(herald.client(proxy.url, SDK), topic);
      await log.live();
      await send(root, { topic, data: 1 });
      await log.count(1);
      const { streams } = proxy;
      proxy.hangStreams();
      await send(root, { topic, data: 2 });
      assert.deepEqual((await log.count(2)).messages.map(({ data, replayed }) => [data, replayed]), [[1, false], [2, true]]);
      assert.ok(proxy.streams > streams);
      await log.live();
      await send(root, { topic, data: 3 });
      await log.count(3);

      // and one on which nothing ever comes
      let left = 1;
      proxy.fate = ({ url, method }) => url === "/api/realtime" && method === "POST" && left-- > 0 ? "html" : "pass";
      proxy.endStreams();
      await until("the proxy has answered for the server", () => left <= 0);
      await send(root, { topic, data: 4 });
      assert.deepEqual((await log.count(4)).data, [1, 2, 3, 4]);
      await log.stop();
    });

    // The SDK (0.28) does not cancel the second request when it connects anew because of the first one, and sends no
    // other before the answer.
    // The oldest SDK cancels its first request then, takes that for an answer, and says that it is connected.
    if (SDK) await t.test(`${name}, and a request that another one has replaced before it was answered`, async () => {
      const topic = "log/replaced";
      const pb = herald.client(proxy.url, SDK);
      const log = await Log.on(pb, topic);
      await log.live();
      let posts = 0, pages = 0, release;
      const released = new Promise((resolve) => (release = resolve));
      proxy.fate = ({ url, method }) => {
        if (url.startsWith("/api/notify/history")) pages++;
        if (url !== "/api/realtime" || method !== "POST") return "pass";
        if (++posts === 1) return pb.realtime.subscribe("log/another", () => {}).catch(() => {}), "hang";
        return released.then(() => "pass");
      };
      proxy.endStreams();
      await until("it is not live, and asks again", () => pages >= 2);
      assert.equal(log.state, "recovering");
      await send(root, { topic, data: 1 });
      release();
      await log.live();
      await send(root, { topic, data: 2 });
      assert.deepEqual((await log.count(2)).data, [1, 2]);
      proxy.fate = () => "pass";
      await log.stop();
    });

    await t.test(`${name}, and a request that is never answered after one that failed`, async () => {
      const topic = `log/stuck${SDK ? "old" : "new"}`;
      const pb = herald.client(proxy.url, SDK);
      const log = await Log.on(pb, topic);
      await log.live();
      let posts = 0;
      proxy.fate = ({ url, method }) => {
        if (url !== "/api/realtime" || method !== "POST") return "pass";
        if (++posts === 1) pb.realtime.subscribe("log/another", () => {}).catch(() => {}); // while that one is under way
        return { 1: 502, 2: "hang" }[posts] ?? "pass";
      };
      proxy.endStreams();
      await until("the proxy has let a request hang", () => posts >= 2);
      await send(root, { topic, data: 1 });
      await log.live();
      await send(root, { topic, data: 2 });
      assert.deepEqual((await log.count(2)).data, [1, 2]);
      proxy.fate = () => "pass";
      await log.stop();
    });
  }
});

test("topics that a hook of the application leaves out", async (t) => {
  const herald = await Herald.install(t);
  await mkdir(join(herald.folder, "pb_hooks"));
  await writeFile(join(herald.folder, "pb_hooks", "a.pb.js"),
    `onRealtimeSubscribeRequest((e) => { e.subscriptions = e.subscriptions.filter((key) => !key.startsWith("log/hidden")); e.next(); });`);
  await herald.start();
  const root = await herald.superuser();
  await root.collection("notify_channels").create({ pattern: "log/{name}", subscribeRule: "*", history: 100 });
  const proxy = await RudeProxy.to(herald.port);
  t.after(() => proxy.close());
  const pb = herald.client(proxy.url);
  const shown = await Log.on(pb, "log/shown");
  const hidden = await Promise.all(Array.from({ length: 5 }, (_, i) => Log.on(pb, `log/hidden${i}`)));
  await shown.live();
  for (const [i, log] of hidden.entries()) {
    await send(root, { topic: `log/hidden${i}`, data: i });
    assert.deepEqual((await log.count(1)).messages.map(({ data, replayed }) => [data, replayed]), [[i, true]]);
    assert.equal(log.state, "recovering");
  }
  assert.equal(shown.state, "live");
  assert.equal(proxy.streams, 1);
});

test("who is signed in is what the token says", async (t) => {
  const { herald, root } = await install(t);
  const [ann, bob] = [await addUser(root, "ann@example.com", { name: "member" }), await addUser(root, "bob@example.com", { name: "member" })];
  const real = Date.now;
  for (const [name, SDK, ahead] of [["a clock that is right", undefined, 0], ["a clock that is ahead", undefined, 400 * 86_400_000],
    ["a clock that is behind", undefined, -400 * 86_400_000], ["the oldest SDK", OldestPocketBase, 0], ["the oldest SDK, a clock that is ahead", OldestPocketBase, 400 * 86_400_000]]) {
    await t.test(name, async (t) => {
      t.mock.method(Date, "now", () => real() + ahead);
      const topic = `log/${name.replaceAll(/\W/g, "")}`;
      const pb = herald.client(herald.url, SDK);
      const signIn = (email) => pb.collection("users").authWithPassword(email, "1234567890");
      await signIn("ann@example.com");
      const log = await Log.on(pb, topic);
      await log.live();
      const tell = (user, data) => send(root, { topic, data, to: { users: [`users:${user.id}`] } });
      await tell(ann, "ann 1");
      await log.count(1);
      pb.authStore.clear();
      await signIn("bob@example.com");
      await tell(ann, "ann 2");
      await tell(bob, "bob 1");
      assert.deepEqual((await log.count(2)).data, ["ann 1", "bob 1"]);
      await log.live();
      await tell(ann, "ann 3");
      await tell(bob, "bob 2");
      assert.deepEqual((await log.count(3)).data, ["ann 1", "bob 1", "bob 2"]);
      assert.equal(log.messages.at(-1).replayed, false);
      await log.stop();
    });
  }
});

test("another user signs in before the first page comes", async (t) => {
  const { herald, root } = await install(t);
  const [ann] = [await addUser(root, "ann@example.com"), await addUser(root, "bob@example.com")];
  await send(root, { topic: "log/late", data: "for Ann", to: { users: [`users:${ann.id}`] } });
  await send(root, { topic: "log/late", data: "for all" });
  const pb = await herald.signIn("ann@example.com");
  const bob = (await herald.signIn("bob@example.com")).authStore;
  const request = pb.send.bind(pb);
  pb.send = async (...args) => {
    const answer = await request(...args); // as Ann
    if (args[0].includes("history")) pb.authStore.save(bob.token, bob.record);
    return answer;
  };
  const log = await Log.on(pb, "log/late", { rewind: 10 });
  await log.count(1);
  await log.live();
  assert.deepEqual(log.data, ["for all"]);
});

test("the SDK's own calls end a subscription", async (t) => {
  const { herald } = await install(t);
  for (const SDK of [undefined, OldestPocketBase]) {
    const pb = herald.client(herald.url, SDK);
    const [one, two, three] = [await Log.on(pb, "log/one"), await Log.on(pb, "log/two"), await Log.on(pb, "log/three")];
    await Promise.all([one, two, three].map((log) => log.live()));
    await pb.realtime.unsubscribe("log/one");
    assert.equal(one.state, "closed");
    await pb.realtime.unsubscribeByPrefix("log/tw");
    assert.deepEqual([two.state, three.state], ["closed", "live"]);
    await pb.realtime.unsubscribe();
    assert.equal(three.state, "closed");
    assert.ok(!Object.hasOwn(pb.realtime, "unsubscribe"));
    // and all begins anew
    const again = await Log.on(pb, "log/one");
    await again.live();
    await again.stop();
  }
  await assert.rejects(subscribe({ realtime: { subscribe: (topic, callback) => callback } }, "log/one", () => {}), /0\.21 or newer/);
});

test("nothing goes on once all subscriptions have ended", async (t) => {
  const { herald } = await install(t);
  const ways = ["realtime.unsubscribe()", 'realtime.unsubscribe("log/one"); await pb.realtime.unsubscribe("log/two")', "stop()"];
  await Promise.all(["pocketbase", "pocketbase-oldest"].flatMap((sdk) => ways.map(async (way) => {
    // Node ends by itself when no timer and no connection is left
    const child = spawn(process.execPath, ["--input-type=module", "--eval", `
      import PocketBase from "${sdk}";
      import { EventSource } from "eventsource";
      import { subscribe } from "./clients/js/herald.js";
      Object.assign(globalThis, { EventSource });
      const pb = new PocketBase("${herald.url}");
      const live = [];
      const stops = await Promise.all(["log/one", "log/two"].map(async (topic) => {
        const isLive = new Promise((resolve) => live.push(resolve));
        const stop = await subscribe(pb, topic, () => {}, { onState: (state) => state === "live" && live.shift()?.() });
        await isLive;
        return stop;
      }));
      pb.stop = () => Promise.all(stops.map((stop) => stop()));
      await pb.${way};
      console.log("ended");
    `], { cwd: root, stdio: ["ignore", "pipe", "inherit"] });
    t.after(() => child.kill());
    let out = "", code;
    child.stdout.on("data", (data) => (out += data));
    child.on("close", (exitCode) => (code = exitCode));
    await until(`Node ends after ${way} with ${sdk}`, () => code !== undefined);
    assert.deepEqual([code, out], [0, "ended\n"]);
  })));
});

/** A subscription of herald.js in a tab of its own, whose clock is ahead by some time. */
async function openTab(browser, url, topic, ahead, auth) {
  const tab = await (await browser.newContext()).newPage(); // each context has connections of its own
  tab.problems = [];
  tab.on("pageerror", (error) => tab.problems.push(String(error))); // unhandled rejections too
  await setClockAhead(tab, ahead);
  await tab.goto(url);
  await tab.evaluate(async ({ topic, auth }) => {
    const [{ default: PocketBase }, { subscribe }] = await Promise.all([import("/lib/pocketbase.es.mjs"), import("/herald.js")]);
    const pb = new PocketBase(location.origin);
    if (auth) pb.authStore.save(auth.token, auth.record);
    window.log = { messages: [], gaps: [], state: "" };
    window.describe = () => JSON.stringify({
      messages: window.log.messages.length, state: window.log.state, clientId: pb.realtime.clientId, isConnected: pb.realtime.isConnected,
      stream: pb.realtime.eventSource?.readyState, attempts: pb.realtime.reconnectAttempts, keys: Object.keys(pb.realtime.subscriptions),
    });
    await subscribe(pb, topic, (message) => window.log.messages.push(message), {
      onGap: (gap) => window.log.gaps.push(gap),
      onState: (state) => (window.log.state = state),
    });
  }, { topic, auth });
  return tab;
}

for (const start of ["start", "startBehindEdge"]) test(`a network that fails at random: ${start}`, async (t) => {
  const clients = 50, tabs = 5, year = 365 * 86_400_000; // 45 in Node, 5 in Chromium
  const seconds = Number(process.env.CHAOS_SECONDS || 20);
  const at = whereabouts(t);
  const { herald, root, channel, channels } = await install(t, start, "--notifyHeartbeat=2s");
  await channels.update(channel.id, { history: 100_000 });
  await addUser(root, "ann@example.com");
  const { token, record } = (await herald.signIn("ann@example.com")).authStore;
  const rude = await RudeProxy.to(herald.port); // which speaks HTTP
  t.after(() => rude.close());
  const faulty = await FaultyProxy.to(rude.port); // which does not
  t.after(() => faulty.close());
  const seed = Number(process.env.CHAOS_SEED || Date.now() % 1_000_000);
  console.log(`CHAOS_SEED=${seed}`); // at once: a run that is cut off says nothing else

  const now = Date.now;
  t.mock.method(Date, "now", () => now() + year);
  // the even ones signed in, every fourth with the oldest SDK
  const client = (i) => {
    const pb = herald.client(faulty.url, i % 4 === 1 ? OldestPocketBase : undefined);
    if (i % 2 === 0) pb.authStore.save(token, record);
    return pb;
  };
  at("the browser's start");
  const browser = await launchBrowser(t);
  at("subscribing");
  // every third has two topics, and asks for the pages of both at once
  const logs = await Promise.all(Array.from({ length: clients - tabs }, (_, i) => i).flatMap((i) => {
    const pb = client(i);
    return (i % 3 === 0 ? [i, i + 1] : [i]).map(async (n) => Object.assign(await Log.on(pb, `log/${n % 5}`), { n: n % 5 }));
  }));
  const opened = await Promise.all(Array.from({ length: tabs }, (_, i) =>
    openTab(browser, faulty.url, `log/${i % 5}`, (i - 2) * year, i % 2 === 0 ? { token, record } : null)));
  at("going live");
  await Promise.all(logs.map((log) => log.live()));
  await Promise.all(opened.map((tab) => tab.waitForFunction(() => window.log.state === "live")));
  at("sending");
  faulty.fail(seed);
  rude.fail(seed);
  const sent = [0, 0, 0, 0, 0];
  for (const end = now() + seconds * 1000; now() < end; ) {
    await Promise.all(sent.map(async (count, i) => {
      await send(root, { topic: `log/${i}`, data: count });
      sent[i]++;
    }));
    await new Promise((resolve) => setTimeout(resolve, 50)); // the pace of the senders; nothing depends on it
  }
  faulty.heal();
  rude.heal();
  for (const [i, log] of logs.entries()) {
    at(() => `client ${i} of ${sent[log.n]} messages: ${log.describe()}`);
    try {
      await log.count(sent[log.n]);
      await log.live();
    } catch (error) {
      const { clientId } = log.pb.realtime;
      const { items } = await root.send("/api/notify/clients", { query: { topic: `log/${log.n}`, perPage: 500 }, requestKey: null });
      t.diagnostic(`client ${i}: ${log.describe()}; proxy: ${rude.describe(clientId)}; server: ${JSON.stringify(items.find(({ id }) => id === clientId))}`);
      throw error;
    }
  }
  for (const [i, tab] of opened.entries()) {
    at(`tab ${i}`);
    try {
      await tab.waitForFunction((count) => window.log.messages.length >= count && window.log.state === "live", sent[i % 5], { timeout: 60_000 });
    } catch (error) {
      t.diagnostic(`tab ${i} of ${sent[i % 5]} messages: ${await tab.evaluate(() => window.describe())}`);
      throw error;
    }
    logs.push({ ...await tab.evaluate(() => window.log), n: i % 5 });
    assert.deepEqual(tab.problems, []);
  }
  for (const [i, log] of logs.entries()) {
    assert.deepEqual(log.messages.map(({ data, seq }) => [data, seq]), Array.from({ length: sent[log.n] }, (_, n) => [n, n + 1]), `client ${i}`);
    assert.deepEqual(log.gaps, []);
  }
  const replayed = logs.reduce((sum, log) => sum + log.messages.filter((message) => message.replayed).length, 0);
  t.diagnostic(`${sent[0] * 5} messages, ${faulty.count} connections failed, ${rude.count} answers were not the server's, ` +
    `${replayed} of ${logs.reduce((sum, log) => sum + log.messages.length, 0)} deliveries were recovered`);
  assert.ok(faulty.count > clients / 5 && rude.count > clients / 5, "the network did not fail");
});
