// Channels through the stock JavaScript SDK, and hooks in pb_hooks, against the
// built executable.

import assert from "node:assert/strict";
import { mkdir, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { test } from "node:test";

import { addUser, Herald, Received, send, until } from "./kit.mjs";

const memberRule = "@collection.room_members.room ?= @request.query.room && @collection.room_members.user ?= @request.auth.id";

const publish = (client, body) => client.send("/api/notify/publish", { method: "POST", body, requestKey: null });

const forbidden = (topic) => (error) => {
  assert.equal(error.status, 403);
  assert.match(error.message, new RegExp(`not allowed to listen to .*"${topic}"`));
  return true;
};

/** Private rooms, a topic for each user, a public feed and one for superusers. */
async function install(t, hooks) {
  const herald = await Herald.install(t);
  if (hooks) {
    await mkdir(join(herald.folder, "pb_hooks"));
    await writeFile(join(herald.folder, "pb_hooks/main.pb.js"), hooks);
  }
  await herald.start();
  const root = await herald.superuser();
  const ann = await addUser(root, "ann@example.com", { name: "Ann" });
  const bob = await addUser(root, "bob@example.com", { name: "Bob" });
  const users = await root.collections.getOne("users");
  await root.collections.create({
    name: "room_members",
    type: "base",
    fields: [
      { name: "room", type: "text", required: true },
      { name: "user", type: "relation", collectionId: users.id, cascadeDelete: true, required: true },
    ],
  });
  const channels = root.collection("notify_channels");
  await channels.create({ pattern: "chat/{room}", subscribeRule: memberRule, publishRule: memberRule });
  await channels.create({ pattern: "user/{id}", subscribeRule: "@request.query.id = @request.auth.id" });
  await channels.create({ pattern: "feed", subscribeRule: "*" });
  await channels.create({ pattern: "admin/{what...}" });
  const join_ = (room, user) => root.collection("room_members").create({ room, user: user.id });
  return { herald, root, ann, bob, join: join_ };
}

test("channels", async (t) => {
  const { herald, root, ann, bob, join } = await install(t);
  await join("42", ann);

  await t.test("a first subscribe that is denied rejects, and succeeds after sign-in", async () => {
    const client = herald.client();
    await assert.rejects(client.realtime.subscribe("chat/42", () => {}), forbidden("chat/42"));
    await client.collection("users").authWithPassword("ann@example.com", "1234567890");
    const received = await Received.on(client, "chat/42");
    await send(root, { topic: "chat/42", data: { n: 1 } });
    assert.deepEqual(await received.next(), { n: 1 });
  });

  await t.test("signs in while connected", async () => {
    const client = herald.client();
    const feed = await Received.on(client, "feed");
    const id = client.realtime.clientId;
    await assert.rejects(client.realtime.subscribe("chat/42", () => {}), forbidden("chat/42"));
    await send(root, { topic: "feed", data: { n: 1 } });
    assert.deepEqual(await feed.next(), { n: 1 });
    await client.collection("users").authWithPassword("ann@example.com", "1234567890");
    await client.realtime.unsubscribe("chat/42"); // the SDK keeps the listener of the one that was refused
    const chat = await Received.on(client, "chat/42");
    await send(root, { topic: "chat/42", data: { n: 2 } });
    assert.deepEqual(await chat.next(), { n: 2 });
    assert.equal(client.realtime.clientId, id);

    // and out: authStore.clear() is the SDK's sign-out, and its next request tells
    const denied = await Received.on(client, "@denied");
    client.authStore.clear();
    await client.realtime.subscribe("other", () => {});
    assert.deepEqual(await denied.next(), { topic: "chat/42", status: 403, message: "You are not allowed to listen to this topic." });
    await send(root, { topic: "chat/42", data: { n: 3 } });
    await send(root, { topic: "feed", data: { n: 4 } });
    assert.deepEqual(await feed.next(), { n: 4 });
    assert.equal(chat.waiting, 0);
    assert.equal(client.realtime.clientId, id);
  });

  await t.test("a denied topic among allowed ones", async () => {
    const client = await herald.signIn("bob@example.com");
    let connects = 0;
    await client.realtime.subscribe("PB_CONNECT", () => connects++);
    const feed = Received.on(client, "feed"); // at once: one request for all
    const mine = Received.on(client, `user/${bob.id}`);
    const chat = Received.on(client, "chat/42").catch((error) => error);
    const [feeds, mines] = await Promise.all([feed, mine, chat]);
    const denied = await Received.on(client, "@denied"); // which asks for all again
    assert.equal((await denied.next()).topic, "chat/42");
    await send(root, { topic: "chat/42", data: { secret: 1 } });
    await send(root, { topic: `user/${bob.id}`, data: { n: 1 } });
    await send(root, { topic: "feed", data: { n: 2 } });
    assert.deepEqual(await mines.next(), { n: 1 });
    assert.deepEqual(await feeds.next(), { n: 2 });
    assert.equal(connects, 1);
    assert.equal(client.realtime.isConnected, true);
  });

  await t.test("a reconnect with a topic that is no longer allowed", async () => {
    const client = await herald.signIn("bob@example.com");
    const membership = await join("43", bob);
    const connects = await Received.on(client, "PB_CONNECT");
    const [denied, feed] = [await Received.on(client, "@denied"), await Received.on(client, "feed")];
    const chat = await Received.on(client, "chat/43");
    await connects.next();
    await herald.stop();
    await herald.start();
    await connects.next();
    await until("all is subscribed again", async () =>
      (await root.send("/api/notify/clients?user=users:" + bob.id, {})).items.some((item) => item.subscriptions.includes("chat/43")));
    await send(root, { topic: "chat/43", data: { n: 1 } });
    assert.deepEqual(await chat.next(), { n: 1 });

    await herald.stop();
    await herald.start();
    await root.collection("room_members").delete(membership.id);
    await connects.next();
    assert.equal((await denied.next()).topic, "chat/43");
    await send(root, { topic: "chat/43", data: { n: 2 } });
    await send(root, { topic: "feed", data: { n: 3 } });
    assert.deepEqual(await feed.next(), { n: 3 });
    assert.equal(chat.waiting, 0);
  });

  await t.test("a member is removed, and comes back", async () => {
    const client = await herald.signIn("bob@example.com");
    const membership = await join("44", bob);
    const denied = await Received.on(client, "@denied");
    const chat = await Received.on(client, "chat/44", { query: { envelope: true } });
    await publish(client, { topic: "chat/44", data: { text: "hi" } });
    const envelope = await chat.next();
    assert.deepEqual({ ...envelope, id: "", time: "" }, { id: "", topic: "chat/44", epoch: "", seq: 0, time: "", from: `users:${bob.id}`, data: { text: "hi" } });
    assert.ok(Math.abs(new Date(envelope.time) - Date.now()) < 60_000, envelope.time);

    await root.collection("room_members").delete(membership.id);
    assert.equal((await denied.next()).topic, "chat/44");
    await assert.rejects(publish(client, { topic: "chat/44", data: 1 }), (error) => error.status === 403);
    await send(root, { topic: "chat/44", data: { secret: 1 } });

    await join("44", bob);
    await client.realtime.unsubscribe("chat/44");
    const again = await Received.on(client, "chat/44");
    await publish(client, { topic: "chat/44", data: { text: "back" } });
    assert.deepEqual(await again.next(), { text: "back" });
    assert.equal(chat.waiting, 0);
  });

  await t.test("publishes to others only", async () => {
    const [one, two] = [await herald.signIn("ann@example.com"), await herald.signIn("ann@example.com")];
    const [mine, others] = [await Received.on(one, "chat/42"), await Received.on(two, "chat/42")];
    await publish(one, { topic: "chat/42", data: { n: 1 }, self: false, clientId: one.realtime.clientId });
    await one.send("/api/notify/publish", { method: "POST", body: { topic: "chat/42", data: { n: 2 }, self: false }, headers: { "X-Client-Id": one.realtime.clientId } });
    await publish(two, { topic: "chat/42", data: { n: 3 } });
    assert.deepEqual([await others.next(), await others.next(), await others.next()], [{ n: 1 }, { n: 2 }, { n: 3 }]);
    assert.deepEqual(await mine.next(), { n: 3 });
  });

  await t.test("whether a room exists nobody is told", async () => {
    const answers = [];
    for (const topic of ["chat/42", "chat/4711", "admin/x"]) {
      const client = await herald.signIn("bob@example.com");
      for (const attempt of [() => client.realtime.subscribe(topic, () => {}), () => publish(client, { topic, data: 1 })]) {
        const error = await attempt().then(() => assert.fail(), (error) => error);
        answers.push(JSON.stringify([error.status, error.response]).replaceAll(topic, "T"));
      }
    }
    assert.equal(new Set(answers).size, 2, answers.join("\n"));
  });
});

test("pb_hooks and publishing", async (t) => {
  const { herald, ann, bob, join, root } = await install(t, `
    onNotifyPublish((e) => {
      if (e.topic === "chat/42" && e.data.text === "damn") {
        throw new ForbiddenError("Mind your language.");
      }
      e.data.name = e.auth.getString("name");
      e.data.pattern = e.channel.getString("pattern");
      if (e.data.tags) {
        e.data.tags.push("x");
        e.data.tags[0].list.unshift({ n: 1 });
        e.data.ids.unshift("first");
      }
      if (e.data.text === "not to Bob") e.exceptUsers.push("users:" + $app.findAuthRecordByEmail("users", "bob@example.com").id);
      e.next();
    });
    onRecordCreate((e) => {
      e.record.set("room", e.record.getString("room").trim());
      e.next();
    }, "room_members");
    routerAdd("GET", "/hello", (e) => e.json(200, { app: !!$app.dataDir(), root: typeof $app.rootCmd }));
    cronAdd("nothing", "0 0 1 1 *", () => {});
  `);
  await join(" 42 ", ann); // the stock hooks work
  await join("42", bob);
  assert.deepEqual(await root.send("/hello", {}), { app: true, root: "object" });
  const [anns, bobs] = [await herald.signIn("ann@example.com"), await herald.signIn("bob@example.com")];
  const [toAnn, toBob] = [await Received.on(anns, "chat/42"), await Received.on(bobs, "chat/42")];

  await publish(anns, { topic: "chat/42", data: { text: "hi" } });
  for (const received of [toAnn, toBob]) assert.deepEqual(await received.next(), { text: "hi", name: "Ann", pattern: "chat/{room}" });
  await assert.rejects(publish(anns, { topic: "chat/42", data: { text: "damn" } }), (error) => error.status === 403 && error.message === "Mind your language.");
  await publish(anns, { topic: "chat/42", data: { text: "not to Bob" } });
  assert.equal((await toAnn.next()).text, "not to Bob");
  await publish(bobs, { topic: "chat/42", data: { text: "over" } });
  assert.equal((await toAnn.next()).text, "over");
  assert.equal((await toBob.next()).text, "over");

  // lists are changed in place; half an emoji, two of one name, and an integer that is none in JavaScript
  const channel = await root.collection("notify_channels").getFirstListItem('pattern = "chat/{room}"');
  await root.collection("notify_channels").update(channel.id, { history: 10 });
  const body = '{"topic": "chat/42", "data": {"id": 9007199254740993, "text": "a", "text": "hi \\ud83d", "tags": [{"list": [2]}], "ids": [9007199254740993, 9007199254740992, {"of": 9007199254740995}]}}';
  const raw = await fetch(`${herald.url}/api/notify/publish`, { method: "POST", headers: { authorization: anns.authStore.token, "content-type": "application/json" }, body });
  assert.equal(raw.status, 200);
  const stream = await toAnn.next();
  assert.deepEqual([stream.text, stream.tags], ["hi \ufffd", [{ list: [{ n: 1 }, 2] }, "x"]]);
  const page = await (await fetch(`${herald.url}/api/notify/history?topic=chat/42`, { headers: { authorization: anns.authStore.token } })).text();
  assert.match(page, /"id":9007199254740993,"ids":\["first",9007199254740993,9007199254740992,{"of":9007199254740995}\]/);
});
