// The stock JavaScript SDK against the built executable.

import assert from "node:assert/strict";
import { test } from "node:test";

import { addUser, Herald, Received, send, until } from "./kit.mjs";

for (const start of ["start", "startBehindEdge"]) test(`stock SDK: ${start}`, async (t) => {
  const herald = await (await Herald.install(t))[start]();
  const root = await herald.superuser();
  const ann = await addUser(root, "ann@example.com", { name: "Ann", verified: true });
  const bob = await addUser(root, "bob@example.com", { name: "Bob" });

  // all subscribe to "fence": what is sent on it comes after what was sent
  // before, so that its arrival proves that nothing else came
  const fences = new Map();
  const open = async (client) => {
    fences.set(client, await Received.on(client, "fence"));
    return client;
  };
  const fence = async () => {
    await send(root, { topic: "fence", data: { end: true } });
    for (const received of fences.values()) assert.deepEqual(await received.next(), { end: true });
  };

  const guest = await open(herald.client());
  const tab = await open(await herald.signIn("ann@example.com"));
  const phone = await open(await herald.signIn("ann@example.com"));
  const bobs = await open(await herald.signIn("bob@example.com"));

  await t.test("a plain topic", async () => {
    const received = await Received.on(guest, "example");
    const other = await Received.on(guest, "example2");
    const report = await send(root, { topic: "example", data: { text: "a\nb", n: 1.5, list: [1, null] } });
    assert.deepEqual({ ...report, id: "" }, { id: "", topic: "example", matched: 1, queued: 1, dropped: 0 });
    assert.deepEqual(await received.next(), { text: "a\nb", n: 1.5, list: [1, null] });
    await fence();
    assert.equal(other.waiting, 0);
    await guest.realtime.unsubscribe("example");
    assert.equal((await send(root, { topic: "example", data: 1 })).matched, 0);
  });

  await t.test("a topic with options, beside the plain one", async () => {
    const plain = await Received.on(guest, "options");
    const german = await Received.on(guest, "options", { query: { lang: "de" }, headers: { "X-A": "ü&?=\n" } });
    const report = await send(root, { topic: "options", data: { n: 1 } });
    assert.equal(report.matched, 1); // one connection
    assert.deepEqual(await plain.next(), { n: 1 });
    assert.deepEqual(await german.next(), { n: 1 });
  });

  await t.test("two tabs of one user, and nobody else", async () => {
    const [first, second, stranger, visitor] = await Promise.all([tab, phone, bobs, guest].map((client) => Received.on(client, "mine")));
    assert.equal((await send(root, { topic: "mine", data: { to: "ann" }, to: { users: [`users:${ann.id}`] } })).queued, 2);
    assert.deepEqual(await first.next(), { to: "ann" });
    assert.deepEqual(await second.next(), { to: "ann" });
    assert.equal((await send(root, { topic: "mine", data: { to: "guest" }, to: { auth: "guest" } })).queued, 1);
    assert.deepEqual(await visitor.next(), { to: "guest" });
    await fence();
    assert.deepEqual([first, second, stranger, visitor].map((received) => received.waiting), [0, 0, 0, 0]);
  });

  await t.test("filter and except", async () => {
    const [first, second, stranger] = await Promise.all([tab, phone, bobs].map((client) => Received.on(client, "news")));
    await send(root, { topic: "news", data: { n: 1 }, to: { filter: "verified = true && name ~ 'Ann'" } });
    assert.deepEqual([await first.next(), await second.next()], [{ n: 1 }, { n: 1 }]);
    await send(root, { topic: "news", data: { n: 2 }, except: { users: [`users:${bob.id}`], clients: [tab.realtime.clientId] } });
    assert.deepEqual(await second.next(), { n: 2 });
    await fence();
    assert.deepEqual([first.waiting, second.waiting, stranger.waiting], [0, 0, 0]);

    await assert.rejects(send(root, { topic: "news", data: 1, to: { filter: "nope = 1" } }), (error) =>
      error.status === 400 && error.response.data.to.filter.code === "validation_invalid_filter" && /nope/.test(error.response.data.to.filter.message));
  });

  await t.test("a guest signs in", async () => {
    const client = herald.client();
    const received = await Received.on(client, "upgrade");
    const toAnn = { topic: "upgrade", data: { secret: 1 }, to: { users: [`users:${ann.id}`] } };
    assert.equal((await send(root, toAnn)).matched, 0);
    await client.collection("users").authWithPassword("ann@example.com", "1234567890");
    await Received.on(client, "upgrade-more"); // the SDK sends who it is with its next change
    assert.equal((await send(root, toAnn)).matched, 1);
    assert.deepEqual(await received.next(), { secret: 1 });
    await client.realtime.unsubscribe();
  });

  await t.test("clients cannot send", async () => {
    for (const [client, status] of [[guest, 401], [tab, 403]]) {
      await assert.rejects(send(client, { topic: "mine", data: 1 }), (error) => error.status === status);
    }
  });

  await t.test("record events and custom messages on one connection", async () => {
    const events = await Received.on(tab, `users/${ann.id}`);
    const custom = await Received.on(tab, "beside");
    await root.collection("users").update(ann.id, { name: "Anna" });
    const event = await events.next();
    assert.deepEqual([event.action, event.record.name], ["update", "Anna"]);
    await send(root, { topic: "beside", data: { n: 1 } });
    assert.deepEqual(await custom.next(), { n: 1 });
  });

  await t.test("the inbox", async () => {
    const [first, second, stranger] = await Promise.all([tab, phone, bobs].map((client) => Received.on(client, "@inbox")));
    const { id } = await root.collection("notifications").create({ user: ann.id, title: "Hello", data: { n: 1 } });
    for (const received of [first, second]) {
      assert.deepEqual(await received.next(), { action: "create", id, title: "Hello", body: "", data: { n: 1 }, read: "", unread: 1 });
    }
    await tab.collection("notifications").update(id, { read: new Date() });
    assert.equal((await second.next()).unread, 0);
    await fence();
    assert.equal(stranger.waiting, 0);
  });

  await t.test("the SDK's reconnect after a restart of the server", async () => {
    const received = await Received.on(guest, "restart");
    let connects = 0;
    await guest.realtime.subscribe("PB_CONNECT", () => connects++);
    await herald.stop();
    await herald.start();
    await until("the SDK is back", () => connects > 0);
    assert.equal((await send(root, { topic: "restart", data: { back: true } })).queued, 1);
    assert.deepEqual(await received.next(), { back: true });
  });

  await t.test("disconnecting somebody", async () => {
    const clients = await root.send("/api/notify/clients", { query: { topic: "restart" }, requestKey: null });
    assert.deepEqual([clients.totalItems, clients.items[0].id], [1, guest.realtime.clientId]);
    const before = guest.realtime.clientId;
    await root.send(`/api/notify/clients/${before}`, { method: "DELETE" });
    await until("the SDK is back with a new connection", () => guest.realtime.isConnected && guest.realtime.clientId !== before);
  });
});
