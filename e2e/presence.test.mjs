// Who is present: over the stock SDK alone, in pb_hooks, on the command line, and with
// herald.js in Node and in Chromium.

import assert from "node:assert/strict";
import { mkdir, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { test } from "node:test";

import { presence } from "../pb_public/herald.js";
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
  await assert.rejects(herald.command("notify", "presence", "nothing", "--url", herald.url), /not allowed/);

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
  const mine = await presence(ann, "room/1", { meta: { status: "here" }, onChange: (change) => changes.push(change) });
  const theirs = await presence(bob, "room/1");
  await until("they see each other", () => names(mine) === "Ann,Bob" && names(theirs) === "Ann,Bob");
  assert.equal(mine.total, 2);
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
  changes.length = 0;
  await herald.stop("SIGKILL");
  await herald.start("--notifyHeartbeat=2s");
  await until("they see each other again", () => theirs.get(ref("Ann"))?.meta?.typing === "done" && theirs.get(ref("Ann")).since > "2026" && names(mine) === "Ann,Bob");
  await until("the watcher sees both", () => names(watcher) === "Ann,Bob");
  assert.deepEqual(changes.flatMap(({ leave }) => leave).filter((user) => user === ref("Ann")), []);

  await mine.hide();
  await until("Ann is hidden", () => names(theirs) === "Bob");
  await mine.show();
  await until("Ann is shown", () => names(theirs) === "Ann,Bob");

  // another one signs in on the same client
  await ann.collection("users").authWithPassword("bob@example.com", password);
  await until("Ann has left", () => names(theirs) === "Bob" && names(mine) === "Bob");
  assert.equal(theirs.get(ref("Bob")).meta, null);
  await mine.leave();
  assert.equal(mine.size, 0);
  await until("Bob has one connection", () => theirs.get(ref("Bob"))?.connections === 1);

  // not allowed, and not any more
  await assert.rejects(presence(herald.client(), "other"), ({ status }) => status === 403);
  const [channel] = await channels.getFullList();
  await channels.update(channel.id, { presenceRule: "" });
  await until("the watcher is denied", () => watcher.size === 0);
});

test("more members than a state has", async (t) => {
  const count = 130;
  const { herald, root } = await install(t, {}, {
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
