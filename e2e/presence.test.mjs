// Who is present: over the stock SDK alone, in pb_hooks, on the command line, and with
// herald.js in Node and in Chromium.

import assert from "node:assert/strict";
import { mkdir, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { test } from "node:test";

import { presence } from "../clients/js/herald.js";
import { addUser, Herald, launchBrowser, password, Received, until } from "./kit.mjs";
import { RudeProxy } from "./proxy.mjs";

async function install(t, values = {}, files = {}) {
  const herald = await Herald.install(t);
  for (const [name, text] of Object.entries(files)) {
    await mkdir(join(herald.folder, "pb_hooks"), { recursive: true });
    await writeFile(join(herald.folder, "pb_hooks", name), text);
  }
  await herald.start("--notifyHeartbeat=2s");
  const root = await herald.superuser();
  await root.collection("notify_channels").create({
    pattern: "room/{room}", subscribeRule: "*", presence: true, presenceRule: "*", presenceFields: "name", ...values,
  });
  const users = {};
  for (const name of ["Ann", "Bob"]) users[name] = await addUser(root, `${name.toLowerCase()}@example.com`, { name });
  const ref = (name) => `users:${users[name].id}`;
  const names = (members) => [...members.values()].map(({ fields }) => fields.name).sort().join();
  return { herald, root, ref, names, channels: root.collection("notify_channels") };
}

test("presence with the stock SDK, in pb_hooks and on the command line", async (t) => {
  const { herald, root, ref } = await install(t, {}, {
    "main.pb.js": `
      onNotifyPresence((e) => {
        e.next();
        $notify.send({ topic: "seen", data: { topic: e.topic, join: e.join.map((m) => m.fields.name), meta: e.update.map((m) => m.meta), leave: e.leave, total: e.total } });
        if (e.total === 0) throw new Error("nobody");
      });
      routerAdd("GET", "/who", (e) => e.json(200, {
        who: $notify.presence("room/1").members.map((m) => m.fields.name),
        online: $notify.online(e.request.url.query().get("user")),
      }));
    `,
  });
  const [ann, bob] = [await herald.signIn("ann@example.com"), await herald.signIn("bob@example.com")];
  const seen = await Received.on(root, "seen");
  const watched = await Received.on(bob, "@presence/room/1");
  const { type, members, total } = await watched.next();
  assert.deepEqual([type, members, total], ["state", [], 0]);

  await ann.realtime.subscribe("room/1", () => {});
  const diff = await watched.next();
  assert.equal(diff.type, "diff");
  assert.deepEqual(diff.join.map(({ since, ...member }) => member), [{ user: ref("Ann"), connections: 1, fields: { name: "Ann" }, meta: null }]);
  assert.deepEqual(await seen.next(), { topic: "room/1", join: ["Ann"], meta: [], leave: [], total: 1 });

  await ann.send("/api/notify/presence", { method: "PUT", body: { topic: "room/1", meta: { typing: true } } });
  const { join, update, leave } = await watched.next();
  assert.deepEqual([join, update[0].meta, leave], [[], { typing: true }, []]);
  assert.deepEqual((await seen.next()).meta, [{ typing: true }]);

  assert.deepEqual(await root.send(`/who?user=${ref("Ann")}`, {}), { who: ["Ann"], online: true });
  assert.deepEqual(await root.send(`/api/notify/presence/users?user=${ref("Ann")}`, {}), { user: ref("Ann"), online: true, topics: ["room/1"] });
  const listed = await herald.command("notify", "presence", "room/1", "--url", herald.url);
  assert.match(listed, /USER +SINCE/);
  assert.match(listed, new RegExp(`${ref("Ann")} .*"name":"Ann".*"typing":true`));
  assert.equal(JSON.parse(await herald.command("notify", "presence", "room/1", "--json", "--url", herald.url)).total, 1);
  await assert.rejects(herald.command("notify", "presence", "nothing", "--url", herald.url), /No channel with presence/);

  await ann.realtime.unsubscribe("room/1");
  assert.deepEqual((await watched.next()).leave, [ref("Ann")]);
  assert.deepEqual((await seen.next()).leave, [ref("Ann")]); // and the hook throws
  await ann.realtime.subscribe("room/1", () => {});
  assert.deepEqual((await seen.next()).join, ["Ann"]);
});

test("presence with herald.js", async (t) => {
  const { herald, ref, names, channels } = await install(t);
  const [ann, bob] = [await herald.signIn("ann@example.com"), await herald.signIn("bob@example.com")];
  const changes = [];
  const seen = []; // at each change
  const mine = await presence(ann, "room/1", { meta: { status: "here" }, onChange: (change) => {
    changes.push(change);
    seen.push([names(mine), mine.total]);
  } });
  await until("Ann is told of herself", () => names(mine) === "Ann");
  // whoever is there is known at once, and told afterwards
  const states = [];
  const theirs = await presence(bob, "room/1", { onState: (state) => states.push(state), onChange: () => assert.equal(theirs.total, theirs.size) });
  assert.match(names(theirs), /^Ann/);
  await until("they see each other", () => names(mine) === "Ann,Bob" && names(theirs) === "Ann,Bob");
  assert.equal(mine.total, 2);
  assert.deepEqual(seen, [["Ann", 1], ["Ann,Bob", 2]]);
  assert.deepEqual(changes.flatMap(({ join }) => join.map(({ fields }) => fields.name)), ["Ann", "Bob"]);
  assert.deepEqual(theirs.get(ref("Ann")).meta, { status: "here" });

  const watcher = await presence(herald.client(), "room/1", { join: false }); // a guest who does not take part
  await until("the watcher has the state", () => names(watcher) === "Ann,Bob");
  assert.equal(watcher.guests, 0);

  // what is set in a row: the last one counts, and nobody is told twice
  for (let i = 0; i <= 50; i++) mine.set({ typing: i });
  await mine.set({ typing: "done" });
  await until("the last one is shown", () => theirs.get(ref("Ann")).meta.typing === "done");
  await assert.rejects(mine.set("x".repeat(2000)), ({ status }) => status === 413);
  await mine.set({ typing: "done" });

  // a restart of the server: nobody goes, and what was set is there again
  changes.length = seen.length = 0;
  assert.deepEqual(states.splice(0), ["live"]);
  await herald.stop("SIGKILL");
  await herald.start("--notifyHeartbeat=2s");
  await until("they see each other again", () => theirs.get(ref("Ann"))?.meta?.typing === "done" && theirs.get(ref("Ann")).since > "2026" && names(mine) === "Ann,Bob");
  await until("the watcher sees both", () => names(watcher) === "Ann,Bob");
  assert.deepEqual(changes.flatMap(({ join, leave }) => [...join, ...leave]), []);
  assert.deepEqual(seen.filter(([names, total]) => names !== "Ann,Bob" || total !== 2), []);
  await until("it is live again", () => states.at(-1) === "live");
  assert.deepEqual(states.splice(0), ["connecting", "live"]);

  await mine.hide();
  await until("Ann is hidden", () => names(theirs) === "Bob");
  await mine.show();
  await until("Ann is shown", () => names(theirs) === "Ann,Bob");

  // another one signs in on the same client
  const began = Date.now();
  await ann.collection("users").authWithPassword("bob@example.com", password);
  await until("Ann has left", () => names(theirs) === "Bob");
  assert.ok(Date.now() - began < 9000, `it took ${Date.now() - began} ms: as long as for a connection that is lost`);
  await until("Bob is the only one for the next user", () => names(mine) === "Bob");
  assert.equal(theirs.get(ref("Bob")).meta, null);
  await mine.set(undefined);
  const circle = {};
  await assert.rejects(mine.set(Object.assign(circle, { circle })), TypeError);
  await assert.rejects(mine.set(() => {}), TypeError);
  await assert.rejects(presence(ann, "room/1", { visibel: false }), /visibel/);
  await assert.rejects(presence(ann, "room/1", { visible: "no" }), /visible/);
  await mine.leave();
  assert.equal(mine.size, 0);
  await until("Bob has one connection", () => theirs.get(ref("Bob"))?.connections === 1);

  // not allowed, and not any more
  await assert.rejects(presence(herald.client(), "other"), ({ status }) => status === 403);
  const [channel] = await channels.getFullList();
  await channels.update(channel.id, { presenceRule: "" });
  await until("the watcher is denied", () => watcher.size === 0);
  await until("Bob is denied, too", () => states.at(-1) === "denied" && theirs.size === 0);

  // the server is stopped, and somebody does not come back
  await channels.update(channel.id, { presenceRule: "*" });
  const last = [];
  const [cleo, dan] = [herald.client(), await herald.signIn("ann@example.com")];
  const still = await presence(cleo, "room/1", { join: false, onChange: ({ leave }) => last.push(...leave) });
  await dan.realtime.subscribe("room/1", () => {});
  await until("Ann is there", () => names(still).includes("Ann"));
  dan.realtime.eventSource.close(); // it is switched off
  clearTimeout(dan.realtime.reconnectTimeoutId);
  await herald.stop("SIGKILL");
  await herald.start("--notifyHeartbeat=2s");
  await until("Ann is taken out", () => !names(still).includes("Ann"));
  assert.deepEqual(last, [ref("Ann")]);
});

test("hidden through restarts, and what is refused", async (t) => {
  const { herald, ref, names } = await install(t);
  const [ann, bob] = [await herald.signIn("ann@example.com"), await herald.signIn("bob@example.com")];
  const changes = [];
  const mine = await presence(ann, "room/1", { visible: false, meta: "from the beginning" });
  const theirs = await presence(bob, "room/1", { onChange: (change) => changes.push(change) });
  await until("Bob is there", () => names(theirs) === "Bob" && names(mine) === "Bob");
  const restart = async () => {
    await herald.stop("SIGKILL");
    await herald.start("--notifyHeartbeat=2s");
    const { since } = theirs.get(ref("Bob"));
    await until("Bob is there again, in both", () => [mine, theirs].every((members) => (members.get(ref("Bob"))?.since ?? since) > since));
    await ann.send("/api/notify/presence", { query: { topic: "room/1" } });
  };
  await restart();
  await mine.show();
  await until("Ann is seen", () => names(theirs) === "Ann,Bob");
  assert.equal(theirs.get(ref("Ann")).meta, "from the beginning");
  await restart();
  await until("Ann is seen again", () => names(theirs) === "Ann,Bob" && theirs.get(ref("Ann")).meta === "from the beginning");

  // what is refused does not stand in the way of what comes with it, or later
  const refused = mine.set("x".repeat(2000));
  const hidden = mine.hide();
  await assert.rejects(refused, ({ status }) => status === 413);
  await hidden;
  await until("Ann is hidden", () => names(theirs) === "Bob");
  changes.length = 0;
  await restart();
  assert.deepEqual(changes.flatMap(({ join }) => join).filter(({ user }) => user === ref("Ann")), []);
  await mine.show();
  await until("Ann is seen with what was accepted", () => theirs.get(ref("Ann"))?.meta === "from the beginning");

  // of two on the same page one leaves
  const second = await presence(ann, "room/1");
  await second.leave();
  assert.equal(second.size, 0);
  await mine.set("still here");
  await until("Ann is still here", () => theirs.get(ref("Ann"))?.meta === "still here");

  // an id that the server does not take for this user's connection
  const { send } = ann;
  ann.send = (path, options) => send.call(ann, path, options.body?.clientId ? { ...options, body: { ...options.body, clientId: "nope" } } : options);
  await mine.set("nameless");
  await until("that is shown", () => theirs.get(ref("Ann"))?.meta === "nameless");
});

test("leaving, and coming back", async (t) => {
  const { herald, names, ref } = await install(t);
  const [ann, bob, otherTab] = await Promise.all(["ann", "bob", "ann"].map((name) => herald.signIn(`${name}@example.com`)));
  const told = [];
  const theirs = await presence(bob, "room/1", { join: false, onChange: ({ join, leave }) => told.push(...join.map(() => "join"), ...leave.map(() => "leave")) });
  const awaitNames = (want) => until(`they see ${want}`, () => names(theirs) === want);
  await ann.realtime.subscribe("room/1", () => {}); // which goes on
  const mine = await presence(ann, "room/1");
  await awaitNames("Ann");
  await mine.leave();
  await awaitNames("");
  // another tab does not bring back the one that has left
  const inOtherTab = await presence(otherTab, "room/1", { meta: 1 });
  await awaitNames("Ann");
  assert.equal(theirs.get(ref("Ann")).connections, 1);
  await inOtherTab.leave();
  await awaitNames("");
  const again = await presence(ann, "room/1");
  await awaitNames("Ann");

  // the SDK's own call ends it, and its user has left
  const states = [];
  const closed = await presence(ann, "room/1", { onState: (state) => states.push(state) });
  const began = Date.now();
  await ann.realtime.unsubscribe("room/1");
  await awaitNames("");
  assert.ok(Date.now() - began < 9000, `it took ${Date.now() - began} ms`);
  await until("it is closed", () => states.at(-1) === "closed" && closed.size === 0 && again.size === 0);

  // a page that is loaded again
  globalThis.window = new EventTarget();
  t.after(() => delete globalThis.window);
  const page = await herald.signIn("ann@example.com");
  await presence(page, "room/1");
  await awaitNames("Ann");
  told.length = 0;
  globalThis.window.dispatchEvent(new Event("pagehide"));
  page.realtime.disconnect();
  delete globalThis.window;
  await presence(await herald.signIn("ann@example.com"), "room/1");
  await presence(await herald.signIn("bob@example.com"), "room/1"); // a fence
  await awaitNames("Ann,Bob");
  assert.deepEqual(told, ["join"]);
});

test("a hidden user's page, on which another one signs in", async (t) => {
  const { herald, names } = await install(t);
  const [pb, bob] = [await herald.signIn("ann@example.com"), await herald.signIn("bob@example.com")];
  const joins = [];
  const theirs = await presence(herald.client(), "room/1", { join: false, onChange: ({ join }) => joins.push(...join.map(({ fields }) => fields.name)) });
  const mine = await presence(pb, "room/1", { visible: false });
  await mine.show();
  await until("Ann is seen", () => names(theirs) === "Ann");
  for (let i = 0; i < 8; i++) mine.set({ typing: i }); // as many as to be told to wait
  pb.authStore.save(bob.authStore.token, bob.authStore.record);
  await until("Ann has left", () => names(theirs) === "");
  await until("the page sees the room again", () => mine.total === 0 && pb.realtime.isConnected);
  await mine.set("hidden");
  await mine.show();
  await until("Bob is seen", () => names(theirs) === "Bob");
  assert.deepEqual(joins, ["Ann", "Bob"]);
});

test("renewals, for users and for guests, where only numbers are told", async (t) => {
  const { herald } = await install(t, { presenceTTL: 5, presenceLimit: 1 });
  const [ann, bob] = [await herald.signIn("ann@example.com"), await herald.signIn("bob@example.com")];
  await presence(ann, "room/1");
  const members = await presence(bob, "room/1");
  await presence(herald.client(), "room/1");
  const silent = await herald.signIn("ann@example.com");
  await silent.realtime.subscribe("room/2", () => {}); // the stock SDK does not renew
  const other = await presence(bob, "room/2", { join: false });
  await until("all are counted", () => members.total === 2 && members.guests === 1 && other.total === 1);
  await until("who does not renew is out", () => other.total === 0);
  for (const began = Date.now(); Date.now() - began < 7000; await new Promise((resolve) => setTimeout(resolve, 50))) {
    assert.deepEqual([members.total, members.guests], [2, 1]);
  }
});

test("a server that has stood still does not blame who could not renew", async (t) => {
  const { herald } = await install(t, { presenceTTL: 2 });
  const [ann, bob] = [await herald.signIn("ann@example.com"), await herald.signIn("bob@example.com")];
  await presence(ann, "room/1");
  const seen = [];
  const members = await presence(bob, "room/1", { onCount: ({ total }) => seen.push(total) });
  await presence(herald.client(), "room/1");
  await until("all are there", () => members.total === 2 && members.guests === 1);
  seen.length = 0;
  for (let i = 0; i < 2; i++) {
    herald.process.kill("SIGSTOP");
    await new Promise((resolve) => setTimeout(resolve, 3000)); // longer than the TTL
    herald.process.kill("SIGCONT");
    // some checks later
    for (const began = Date.now(); Date.now() - began < 1500; await new Promise((resolve) => setTimeout(resolve, 20))) {
      assert.deepEqual([members.total, members.guests], [2, 1]);
    }
  }
  assert.deepEqual(seen.filter((total) => total !== 2), []);
});

test("more members than a state has", async (t) => {
  const count = 130;
  const { herald, root } = await install(t, { presenceRule: '@request.auth.name != "Bob"' }, {
    "main.pb.js": `
      routerAdd("POST", "/users", (e) => {
        const users = $app.findCollectionByNameOrId("users");
        users.fields.getByName("password").cost = 4; // else it takes a minute
        $app.save(users);
        const tokens = [];
        for (let i = 0; i < ${count}; i++) {
          const user = new Record(users, { email: "user" + i + "@example.com", name: "" + i });
          user.setRandomPassword();
          $app.save(user);
          tokens.push(user.newAuthToken());
        }
        return e.json(200, tokens);
      }, $apis.requireSuperuserAuth());
    `,
  });
  await Promise.all((await root.send("/users", { method: "POST" })).map((token) => {
    const pb = herald.client();
    pb.authStore.save(token);
    return pb.realtime.subscribe("room/1", () => {});
  }));
  const members = await presence(herald.client(), "room/1", { join: false });
  await until("all are known", () => members.size === count && members.total === count);

  // a page that is on its way to Ann is not for Bob, who may not see it
  const pb = await herald.signIn("ann@example.com");
  const { send } = pb;
  let release, asked;
  const released = new Promise((resolve) => (release = resolve));
  const isAsked = new Promise((resolve) => (asked = resolve));
  pb.send = async (path, options) => {
    const answer = await send.call(pb, path, options);
    if (path === "/api/notify/presence" && options.query?.cursor) {
      asked();
      await released;
    }
    return answer;
  };
  const seen = await presence(pb, "room/1", { join: false });
  await isAsked;
  await pb.collection("users").authWithPassword("bob@example.com", password);
  assert.equal(seen.size, 0);
  release();
  const fence = await presence(herald.client(), "room/1", { join: false });
  await until("others know all", () => fence.size === count);
  assert.deepEqual([seen.size, seen.total], [0, 0]);
  await pb.collection("users").authWithPassword("ann@example.com", password);
  await until("Ann sees them again", () => seen.size === count);
});

test("two browsers", async (t) => {
  const { herald, ref } = await install(t);
  const proxy = await RudeProxy.to(herald.port);
  t.after(() => proxy.close());
  const browser = await launchBrowser(t);
  const open = async (url, email) => {
    const tab = await (await browser.newContext()).newPage();
    await tab.goto(url);
    await tab.evaluate(async ({ email, password }) => {
      const [{ default: PocketBase }, { presence }] = await Promise.all([import("/lib/pocketbase.es.mjs"), import("/herald.js")]);
      const pb = new PocketBase(location.origin);
      await pb.collection("users").authWithPassword(email, password);
      window.members = await presence(pb, "room/1");
    }, { email, password });
    return tab;
  };
  const ann = await open(herald.url, "ann@example.com");
  const bob = await open(proxy.url, "bob@example.com");
  const sees = (tab, ...users) => tab.waitForFunction((users) => users.length === window.members.size && users.every((user) => window.members.has(user)), users, { timeout: 60_000 });
  await Promise.all([sees(ann, ref("Ann"), ref("Bob")), sees(bob, ref("Ann"), ref("Bob"))]);

  await bob.evaluate(() => window.members.set({ typing: true }));
  await ann.waitForFunction((user) => window.members.get(user)?.meta?.typing, ref("Bob"));

  // a proxy that answers in the server's place: what is set is told again, until the server has it
  let left = 2;
  proxy.fate = ({ method }) => (method === "PUT" && left-- > 0 ? "html" : "pass");
  await bob.evaluate(() => window.members.set({ typing: false }));
  assert.ok(left < 0, `${left} answers of the proxy were left`);
  await ann.waitForFunction((user) => window.members.get(user)?.meta?.typing === false, ref("Bob"));

  // a tab that is closed leaves at once, and not after the 10 seconds of a connection that is lost
  const another = await open(herald.url, "bob@example.com");
  await ann.waitForFunction((user) => window.members.get(user).connections === 2, ref("Bob"));
  const began = Date.now();
  await another.close({ runBeforeUnload: true });
  await ann.waitForFunction((user) => window.members.get(user).connections === 1, ref("Bob"));
  assert.ok(Date.now() - began < 9000, `it took ${Date.now() - began} ms`);

  // a stream that dies and is not ended: Bob's page finds out by itself, and goes on
  proxy.hangStreams();
  await ann.evaluate(() => window.members.set({ typing: true }));
  await bob.waitForFunction((user) => window.members.get(user)?.meta?.typing, ref("Ann"), { timeout: 60_000 });
  await Promise.all([sees(ann, ref("Ann"), ref("Bob")), sees(bob, ref("Ann"), ref("Bob"))]);
});

test("a laptop that is closed", async (t) => {
  const { herald, root, ref, names } = await install(t, { presenceTTL: 4 });
  await addUser(root, "cleo@example.com", { name: "Cleo" });
  const browser = await launchBrowser(t);
  const tab = await (await browser.newContext()).newPage();
  await tab.goto(herald.url);
  await tab.evaluate(async ({ password }) => {
    const [{ default: PocketBase }, { presence }] = await Promise.all([import("/lib/pocketbase.es.mjs"), import("/herald.js")]);
    const pb = new PocketBase(location.origin);
    await pb.collection("users").authWithPassword("bob@example.com", password);
    window.changes = [];
    window.members = await presence(pb, "room/1", { meta: "awake", onChange: (change) => window.changes.push(change) });
  }, { password });
  const changes = [];
  const members = await presence(await herald.signIn("ann@example.com"), "room/1", { onChange: (change) => changes.push(change) });
  await until("Ann sees Bob", () => names(members) === "Ann,Bob");
  await tab.waitForFunction(() => window.members.size === 2);

  await browser.signal("SIGSTOP");
  t.after(() => browser.signal("SIGCONT"));
  await until("Bob is out", () => names(members) === "Ann");
  await presence(await herald.signIn("cleo@example.com"), "room/1");
  await until("Cleo is there", () => names(members) === "Ann,Cleo");
  await browser.signal("SIGCONT");
  await until("Bob is back", () => names(members) === "Ann,Bob,Cleo" && members.get(ref("Bob")).meta === "awake");
  await tab.waitForFunction(() => [...window.members.values()].map(({ fields }) => fields.name).sort().join() === "Ann,Bob,Cleo");
  assert.deepEqual(changes.flatMap(({ leave }) => leave), [ref("Bob")]);
});
