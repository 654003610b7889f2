// $notify in pb_hooks, and triggers, over the built executable.

import assert from "node:assert/strict";
import { mkdir, readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { test } from "node:test";

import { addUser, Herald, Received, until } from "./kit.mjs";

test("$notify in pb_hooks", async (t) => {
  const herald = await Herald.install(t);
  await mkdir(join(herald.folder, "pb_hooks"));
  await mkdir(join(herald.folder, "pb_migrations"));
  await writeFile(join(herald.folder, "pb_migrations/1_notify.js"), `
    migrate((app) => {
      const report = $notify.send({ topic: "migrations", data: { n: 1 } });
      if (report.matched !== 0) throw new Error("somebody listens?");
    }, () => {});
  `);
  await writeFile(join(herald.folder, "pb_hooks/main.pb.js"), `
    routerAdd("POST", "/say", (e) => e.json(200, $notify.send(e.requestInfo().body)));
    routerAdd("POST", "/try", (e) => {
      try {
        $notify.send(e.requestInfo().body.message);
      } catch (err) {
        return e.json(200, { isError: err instanceof Error, message: err.message, status: err.status, data: err.data });
      }
      return e.json(200, {});
    });
    routerAdd("GET", "/undefined", (e) => e.json(200, [
      { to: undefined }, { to: null }, { to: {} }, { to: { users: undefined } }, { to: { auth: "user", filter: undefined } },
      { except: undefined }, { except: { users: undefined } }, { to: { users: [undefined] } },
      { to: () => ["users:x"] }, { to: { auth: "user", users: () => [] } }, { to: Symbol() }, { except: { users: Symbol() } },
    ].map((audience) => {
      try {
        $notify.send({ topic: "said", data: 1, ...audience });
      } catch (err) {
        return err.message;
      }
      return "sent";
    })));
    routerAdd("GET", "/record/{id}", (e) => {
      const record = $app.findRecordById("notes", e.request.pathValue("id"));
      $notify.send({ topic: "said", data: { record: record.publicExport(), json: record.get("json"), itself: record, text: "hi 😀".slice(0, 4) } });
      return e.json(200, {});
    });
    routerAdd("POST", "/uncaught", () => $notify.send({ topic: "@inbox", data: 1 }));
    routerAdd("GET", "/lists", (e) => e.json(200, {
      topics: $notify.topics(),
      clients: $notify.clients(),
      mine: $notify.clients({ user: "users:" + e.request.url.query().get("user") }).length,
    }));
    routerAdd("POST", "/kick", (e) => e.json(200, { count: $notify.disconnect({ user: e.requestInfo().body.user }), nobody: $notify.disconnect("nobody") }));
    onRecordAfterCreateSuccess((e) => {
      $notify.send({ topic: "signed-up", data: { name: e.record.getString("name") }, to: { auth: "guest" } });
      e.next();
    }, "users");
    cronAdd("digest", "0 0 1 1 *", () => $notify.send({ topic: "digest", data: { orders: 3 }, id: "digest-1" }));
  `);
  await herald.start();
  const root = await herald.superuser();
  const guest = herald.client();
  const [said, signedUp, digest] = [await Received.on(guest, "said"), await Received.on(guest, "signed-up"), await Received.on(guest, "digest")];
  const post = (path, body) => root.send(path, { method: "POST", body, requestKey: null });

  // a route, with the report
  const report = await post("/say", { topic: "said", data: { text: "hi", list: [1, 2.5, null] }, id: "m1" });
  assert.deepEqual(report, { id: "m1", topic: "said", matched: 1, queued: 1, dropped: 0 });
  assert.deepEqual(await said.next(), { text: "hi", list: [1, 2.5, null] });

  // a record hook, and a cron job
  const ann = await addUser(root, "ann@example.com", { name: "Ann" });
  assert.deepEqual(await signedUp.next(), { name: "Ann" });
  await root.crons.run("digest");
  assert.deepEqual(await digest.next(), { orders: 3 });

  // errors that name the field
  for (const [message, pattern] of [
    [{ topic: "a?b", data: 1 }, /^\$notify: topic: .* must not contain "\?"/],
    [{ topic: "x" }, /data: Cannot be blank/],
    [{ topic: "x", data: 1, to: { filter: "nope = 1" } }, /to\.filter: .*nope/],
    [{ topic: "x", data: 1, to: { users: ["nobody"] } }, /to\.users\.0: .*COLLECTION:RECORD_ID/],
    [{ topic: "x", data: 1, too: {} }, /too: There is no such field/],
    ["text", /A JSON object is expected/],
    [null, /cannot be blank|must be/i],
  ]) {
    const thrown = await post("/try", { message });
    assert.ok(thrown.isError, JSON.stringify(thrown));
    assert.match(thrown.message, pattern);
  }
  const { data, status } = await post("/try", { message: { topic: "", data: 1 } });
  assert.deepEqual([status, data.topic.code], [400, "validation_required"]);
  await assert.rejects(post("/uncaught"), (error) => error.status === 400);

  // what came out undefined is not everybody, and nobody got it (see the next message)
  for (const message of await root.send("/undefined", {})) assert.match(message, /^\$notify: (to|except)/);

  // JSON that Go keeps as bytes
  await root.collections.create({ name: "notes", type: "base", listRule: "", viewRule: "", fields: [{ name: "json", type: "json" }, { name: "none", type: "json" }] });
  const json = { a: [1, { b: null }], c: "x" };
  const note = await root.collection("notes").create({ json });
  await root.send(`/record/${note.id}`, {});
  const sent = await said.next();
  assert.deepEqual([sent.json, sent.record.json, sent.record.none, sent.itself.json, sent.text], [json, json, null, json, "hi \ufffd"]);

  // who is there
  const anns = await herald.signIn("ann@example.com");
  await Received.on(anns, "said");
  const lists = await root.send(`/lists?user=${ann.id}`, {});
  assert.ok(lists.topics.some(({ topic, subscribers, users }) => topic === "said" && subscribers === 2 && users === 1));
  assert.deepEqual(lists.clients.map(({ auth }) => auth).sort(), [`users:${ann.id}`, null].sort());
  assert.equal(lists.mine, 1);
  const { clientId } = anns.realtime;
  assert.deepEqual(await post("/kick", { user: `users:${ann.id}` }), { count: 1, nobody: 0 });
  await until("the SDK comes back", () => anns.realtime.clientId && anns.realtime.clientId !== clientId);

  const types = await readFile(join(herald.folder, "pb_data/herald.d.ts"), "utf8");
  assert.match(types, /declare const \$notify/);
});

test("an order's owner sees that it is shipped", async (t) => {
  const herald = await (await Herald.install(t)).start();
  const root = await herald.superuser();
  const ann = await addUser(root, "ann@example.com");
  await addUser(root, "bob@example.com");
  const users = await root.collections.getOne("users");
  await root.collections.create({
    name: "orders",
    type: "base",
    fields: [
      { name: "status", type: "text" },
      { name: "owner", type: "relation", collectionId: users.id },
    ],
  });
  // the form in the dashboard
  await root.collection("notify_triggers").create({
    name: "shipped", collection: "orders", events: ["update"], changed: "status", filter: 'status = "shipped"',
    topic: "my-orders", fields: "id,status", to: "record:owner", enabled: true,
  });
  const [toAnn, toBob] = [await Received.on(await herald.signIn("ann@example.com"), "my-orders"), await Received.on(await herald.signIn("bob@example.com"), "my-orders")];
  const order = await root.collection("orders").create({ status: "open", owner: ann.id });
  await root.collection("orders").update(order.id, { status: "paid" });
  await root.collection("orders").update(order.id, { status: "shipped" });
  assert.deepEqual(await toAnn.next(), { action: "update", collection: "orders", record: { id: order.id, status: "shipped" } });
  assert.equal(toBob.waiting, 0);
});
