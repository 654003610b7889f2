// One stream for all tabs, in Chromium.

import assert from "node:assert/strict";
import { join } from "node:path";
import { test } from "node:test";

import { addUser, Herald, launchBrowser, password, root as repository, send, until } from "./kit.mjs";
import { RudeProxy } from "./proxy.mjs";

/** Opens a tab that shares its connection and listens to topics; what it got is in window.got. */
async function openTab(context, herald, problems, { topics = ["chat/1", "plain"], shares = true } = {}) {
  const tab = await context.newPage();
  tab.setDefaultTimeout(30_000);
  tab.on("pageerror", (error) => problems.push(String(error)));
  await tab.goto(`${herald.url}/api/health`);
  await tab.evaluate(async ({ topics, shares }) => {
    const { default: PocketBase } = await import("/lib/pocketbase.es.mjs");
    const herald = await import("/herald.js");
    const pb = new PocketBase("/");
    Object.assign(window, { pb, herald, got: Object.fromEntries(topics.map((topic) => [topic, []])), states: {} });
    window.isShared = shares && herald.shareConnection(pb);
    window.ready = Promise.all(topics.map((topic) => herald.subscribe(pb, topic, ({ data }) => window.got[topic].push(data), {
      onState: (state) => (window.states[topic] = state),
    })));
    await window.ready;
  }, { topics, shares });
  return tab;
}

const isLive = (tab) => tab.evaluate(() => Object.values(window.states).every((state) => state === "live"));

const allLive = (tabs) => until("all tabs are live", async () => (await Promise.all(tabs.map(isLive))).every(Boolean));

const got = (tab, topic) => tab.evaluate((topic) => window.got[topic], topic);

async function signIn(context, herald, email) {
  const tab = await context.newPage();
  await tab.goto(`${herald.url}/api/health`);
  await tab.evaluate(async ({ email, password }) => {
    const { default: PocketBase } = await import("/lib/pocketbase.es.mjs");
    await new PocketBase("/").collection("users").authWithPassword(email, password);
  }, { email, password });
  await tab.close();
}

/** The connections that the server has, of anybody but the superuser's client. */
async function connections(root) {
  const { items } = await root.send("/api/notify/clients", { query: { perPage: 500 }, requestKey: null });
  return items;
}

/** Sends numbered messages until it is told to stop, and returns how many there were. */
function sendMany(root, topic, from) {
  let isOver = false;
  const over = (async () => {
    let next = from;
    for (; !isOver; next++) {
      await send(root, { topic, data: next });
      await new Promise((resolve) => setTimeout(resolve, 10));
    }
    return next;
  })();
  return () => {
    isOver = true;
    return over;
  };
}

test("12 tabs share one stream", async (t) => {
  const herald = await (await Herald.install(t)).start();
  const root = await herald.superuser();
  await root.collection("notify_channels").create({
    pattern: "chat/{room}", subscribeRule: '@request.auth.id != ""', history: 10_000, presence: true, presenceRule: '@request.auth.id != ""',
  });
  await addUser(root, "ann@example.com");
  const { id: bobId } = await addUser(root, "bob@example.com");
  const browser = await launchBrowser(t);
  const context = await browser.newContext();
  await signIn(context, herald, "ann@example.com");
  const problems = [];
  const tabs = [];
  let sent = 1;

  const allGot = async () => {
    const want = Array.from({ length: sent - 1 }, (_, i) => i + 1);
    for (const tab of tabs) {
      await until(`all ${sent - 1} messages`, async () => (await got(tab, "chat/1")).length >= sent - 1);
      assert.deepEqual(await got(tab, "chat/1"), want);
    }
  };

  await t.test("all get what is sent", async () => {
    for (let i = 0; i < 12; i++) tabs.push(await openTab(context, herald, problems));
    await allLive(tabs);
    assert.ok((await Promise.all(tabs.map((tab) => tab.evaluate(() => window.isShared)))).every(Boolean));
    assert.equal((await connections(root)).length, 1);
    for (; sent <= 5; sent++) await send(root, { topic: "chat/1", data: sent });
    await send(root, { topic: "plain", data: "hello" });
    await allGot();
    for (const tab of tabs) {
      await until("the message without history", async () => (await got(tab, "plain")).length > 0);
      assert.deepEqual(await got(tab, "plain"), ["hello"]);
    }
  });

  await t.test("presence sees one connection", async () => {
    const counts = (tab) => tab.evaluate(async () => {
      window.members ??= await window.herald.presence(window.pb, "chat/1");
      return [...window.members.values()].map(({ connections }) => connections);
    });
    for (const tab of tabs.slice(0, 3)) assert.deepEqual(await counts(tab), [1]);
    await tabs[1].evaluate(() => window.members.leave()); // and the user stays, in the others
    const { members } = await root.send("/api/notify/presence", { query: { topic: "chat/1" }, requestKey: null });
    assert.deepEqual(members.map(({ connections }) => connections), [1]);
    assert.deepEqual(await counts(tabs[2]), [1]);
  });

  await t.test("a reload is no leave", async () => {
    // only the tab that is loaded again is on this topic
    const watcher = await herald.signIn("bob@example.com");
    const changes = [];
    await watcher.realtime.subscribe("@presence/chat/2", (message) => changes.push(message));
    const join = () => tabs[4].evaluate(async () => void (window.members = await window.herald.presence(window.pb, "chat/2")));
    await join();
    await until("it is present", () => changes.some(({ join }) => join?.length === 1));
    tabs[4] = await (async (tab) => {
      await tab.reload();
      await tab.close();
      return openTab(context, herald, problems);
    })(tabs[4]);
    await join();
    await tabs[4].evaluate(() => window.members.set("again"));
    await until("it shows something", () => changes.some(({ update }) => update?.some(({ meta }) => meta === "again")));
    assert.deepEqual(changes.flatMap(({ leave }) => leave ?? []), []);
    await watcher.realtime.unsubscribe();
    await tabs[4].close();
    tabs.splice(4, 1);
  });

  for (const [how, end] of [
    ["closed", (tab) => tab.close()],
    ["closed without a word", (tab) => tab.close({ runBeforeUnload: false })],
    ["crashed", async (tab) => {
      tab.goto("chrome://crash").catch(() => {});
      await tab.waitForEvent("crash");
      await tab.close();
    }],
  ]) {
    await t.test(`the tab that leads is ${how}`, async () => {
      const [{ id }] = await connections(root);
      const stop = sendMany(root, "chat/1", sent);
      await end(tabs.shift());
      await until("another connection", async () => {
        const all = await connections(root);
        return all.length === 1 && all[0].id !== id;
      });
      await allLive(tabs);
      sent = await stop();
      await allGot();
      await send(root, { topic: "plain", data: how });
      for (const tab of tabs) await until("the message without history", async () => (await got(tab, "plain")).at(-1) === how);
    });
  }

  await t.test("the tab that leads is frozen, and wakes up", async () => {
    const [leader, ...others] = tabs;
    const session = await context.newCDPSession(leader);
    // Chromium freezes no page that holds a lock; what a debugger stops looks the same to others
    const paused = new Promise((resolve) => session.once("Debugger.paused", resolve));
    await session.send("Debugger.enable");
    await session.send("Debugger.pause");
    await paused;
    const stop = sendMany(root, "chat/1", sent);
    const before = (await got(others[0], "chat/1")).length;
    await until("the others get messages", async () => (await got(others[0], "chat/1")).length > before + 20);
    const { length } = await connections(root);
    assert.equal(length, 2, "its own connection stays as long as it is frozen");
    await session.send("Debugger.disable");
    await until("one connection", async () => (await connections(root)).length === 1);
    await allLive(tabs);
    sent = await stop();
    await allGot();
  });

  await t.test("a restart of the server", async () => {
    await herald.stop("SIGKILL");
    await herald.start();
    const stop = sendMany(root, "chat/1", sent);
    await allLive(tabs);
    sent = await stop();
    await allGot();
    assert.equal((await connections(root)).length, 1);
  });

  await t.test("tabs of different users stay apart", async () => {
    const other = await browser.newContext();
    await signIn(other, herald, "bob@example.com");
    const bob = await openTab(other, herald, problems);
    // in the first user's browser, but signed in by itself
    const same = await openTab(context, herald, problems, { topics: ["plain"] });
    await same.evaluate(async ({ password }) => {
      const { default: PocketBase, BaseAuthStore } = await import("/lib/pocketbase.es.mjs");
      window.second = new PocketBase("/", new BaseAuthStore());
      await window.second.collection("users").authWithPassword("bob@example.com", password);
      window.herald.shareConnection(window.second);
      window.secondGot = [];
      await window.herald.subscribe(window.second, "plain", ({ data }) => window.secondGot.push(data));
    }, { password });
    assert.equal((await connections(root)).length, 3);
    const before = (await got(tabs[0], "plain")).length;
    await send(root, { topic: "plain", data: "for bob", to: { users: [`users:${bobId}`] } });
    await until("the same user in another browser", async () => (await got(bob, "plain")).includes("for bob"));
    await until("another client on the page", () => same.evaluate(() => window.secondGot.includes("for bob")));
    await send(root, { topic: "plain", data: "for all" });
    for (const tab of [...tabs, same]) await until("what comes after", async () => (await got(tab, "plain")).at(-1) === "for all");
    assert.deepEqual((await got(tabs[0], "plain")).slice(before), ["for all"]);
    await bob.close();
    await same.close();
    await until("one connection", async () => (await connections(root)).length === 1);
  });

  await t.test("signed out", async () => {
    await tabs[1].evaluate(() => window.pb.authStore.clear());
    for (const tab of tabs) await until("denied", () => tab.evaluate(() => window.states["chat/1"] === "denied"));
    const all = await connections(root);
    assert.equal(all.length, 1);
    assert.ok(!all[0].user);
    await signIn(context, herald, "ann@example.com");
    await allLive(tabs);
    for (const end = sent + 3; sent < end; sent++) await send(root, { topic: "chat/1", data: sent });
    await allGot();
    assert.equal((await connections(root)).length, 1);
  });

  assert.deepEqual(problems, []);
});

test("a few tabs share one stream", async (t) => {
  const herald = await (await Herald.install(t)).start();
  const root = await herald.superuser();
  await root.collection("notify_channels").create({ pattern: "chat/{room}", subscribeRule: '@request.query.room = "1"', history: 100 });
  await addUser(root, "ann@example.com");
  const browser = await launchBrowser(t);
  const problems = [];

  await t.test("with the SDK's own subscriptions", async (t) => {
    const context = await browser.newContext();
    t.after(() => context.close());
    const [one, two] = [await openTab(context, herald, problems), await openTab(context, herald, problems)];
    await send(root, { topic: "chat/1", data: "before" });
    for (const tab of [one, two]) {
      // the same one in both: what it begins with is for each
      await tab.evaluate(async () => {
        window.stock = [];
        window.end = await window.pb.realtime.subscribe("chat/1", ({ data }) => window.stock.push(data), { query: { rewind: "1" } });
      });
      await until("what was before", () => tab.evaluate(() => window.stock.length === 1));
    }
    await one.evaluate(() => window.end());
    await send(root, { topic: "chat/1", data: "after" });
    await until("what comes after", () => two.evaluate(() => window.stock.join() === "before,after"));
    assert.deepEqual(await one.evaluate(() => window.stock), ["before"]);

    const refused = await two.evaluate(() => window.pb.realtime.subscribe("chat/2", () => {}).then(() => null, ({ status, response }) => ({ status, response })));
    assert.equal(refused.status, 403);
    assert.equal(Object.values(refused.response.data.subscriptions)[0].code, "validation_topic_forbidden");
    await send(root, { topic: "chat/1", data: "still" });
    for (const tab of [one, two]) await until("what comes after a refusal", async () => (await got(tab, "chat/1")).at(-1) === "still");

    // the tab that leads has nothing to listen to any more
    await one.evaluate(() => window.pb.realtime.unsubscribe());
    await send(root, { topic: "plain", data: "without history" });
    await until("a tab that does not lead", async () => (await got(two, "plain")).length === 1);
    assert.equal((await connections(root)).length, 1);
    await two.evaluate(() => window.pb.realtime.unsubscribe());
    await until("no connection", async () => (await connections(root)).length === 0);
  });

  await t.test("what one tab listens to makes no request of another one refused", async (t) => {
    const context = await browser.newContext();
    t.after(() => context.close());
    const tabs = [await openTab(context, herald, problems), await openTab(context, herald, problems)];
    for (const tab of tabs) {
      const results = await tab.evaluate(() => Promise.all(["chat/1", "chat/2"].map((topic) =>
        window.pb.realtime.subscribe(topic, () => {}).then(() => "ok", ({ status }) => status))));
      assert.deepEqual(results, ["ok", "ok"]); // as without sharing: one of two is let
    }
  });

  await t.test("signing in while the first connection is made", async (t) => {
    const context = await browser.newContext();
    t.after(() => context.close());
    const tab = await openTab(context, herald, problems, { topics: [] });
    let release;
    const held = new Promise((resolve) => (release = resolve));
    let isHeld = false;
    await tab.route("**/api/realtime", async (route) => {
      if (route.request().method() === "GET" && !isHeld) {
        isHeld = true;
        await held;
      }
      await route.continue();
    });
    const subscribed = tab.evaluate(() => window.herald.subscribe(window.pb, "plain", ({ data }) => (window.last = data)).then(() => "ok"));
    await until("it connects", () => isHeld);
    await signIn(context, herald, "ann@example.com");
    release();
    assert.equal(await subscribed, "ok");
    await send(root, { topic: "plain", data: "for ann", to: { auth: "user" } });
    await until("a message for a user", () => tab.evaluate(() => window.last === "for ann"));
  });

  await t.test("not where locks are refused", async (t) => {
    const context = await browser.newContext();
    t.after(() => context.close());
    await context.addInitScript(() => (LockManager.prototype.request = () => Promise.reject(new DOMException("not here", "SecurityError"))));
    const tab = await openTab(context, herald, problems);
    await send(root, { topic: "chat/1", data: 1 });
    await until("a message", async () => (await got(tab, "chat/1")).length === 1);
  });

  await t.test("with the oldest SDK", async (t) => {
    const context = await browser.newContext();
    t.after(() => context.close());
    await context.route("**/lib/pocketbase.es.mjs", (route) => route.fulfill({ path: join(repository, "node_modules/pocketbase-oldest/dist/pocketbase.es.mjs"), contentType: "text/javascript" }));
    const [one, two] = [await openTab(context, herald, problems), await openTab(context, herald, problems)];
    assert.ok(await one.evaluate(() => window.isShared && !window.pb.buildURL));
    await send(root, { topic: "chat/1", data: 1 });
    for (const tab of [one, two]) await until("a message", async () => (await got(tab, "chat/1")).length === 1);
    assert.equal((await connections(root)).length, 1);
    await one.close();
    await send(root, { topic: "chat/1", data: 2 });
    await until("the next one", async () => (await got(two, "chat/1")).join() === "1,2");
  });

  await t.test("not without Web Locks", async (t) => {
    const context = await browser.newContext();
    t.after(() => context.close());
    await context.addInitScript(() => Object.defineProperty(Navigator.prototype, "locks", { value: undefined }));
    const [one, two] = [await openTab(context, herald, problems), await openTab(context, herald, problems)];
    assert.equal(await one.evaluate(() => window.isShared), false);
    await send(root, { topic: "chat/1", data: 1 });
    for (const tab of [one, two]) await until("a message", async () => (await got(tab, "chat/1")).length === 1);
    assert.equal((await connections(root)).length, 2);
  });

  assert.deepEqual(problems, []);
});

test("tabs share a stream that dies without an end", async (t) => {
  const herald = await (await Herald.install(t)).start("--notifyHeartbeat=1s");
  const root = await herald.superuser();
  await root.collection("notify_channels").create({ pattern: "chat/{room}", subscribeRule: "*", history: 100 });
  const proxy = await RudeProxy.to(herald.port);
  t.after(() => proxy.close());
  const context = await (await launchBrowser(t)).newContext();
  const problems = [];
  const tabs = [];
  for (let i = 0; i < 3; i++) tabs.push(await openTab(context, proxy, problems, { topics: ["chat/1"] }));
  await allLive(tabs);
  for (let sent = 1; sent <= 3; sent++) {
    const { streams } = proxy;
    proxy.hangStreams();
    await send(root, { topic: "chat/1", data: sent });
    for (const tab of tabs) await until("it came", async () => (await got(tab, "chat/1")).length === sent);
    assert.ok(proxy.streams > streams);
  }
  for (const tab of tabs) assert.deepEqual(await got(tab, "chat/1"), [1, 2, 3]);
  await allLive(tabs);
  await until("one connection is left", async () => (await connections(root)).length === 1);
  assert.deepEqual(problems, []);
});
