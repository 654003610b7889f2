// The life of the server: its end under load, its limits, handlers in pb_hooks.

import assert from "node:assert/strict";
import { mkdir, writeFile } from "node:fs/promises";
import { connect } from "node:net";
import { join } from "node:path";
import { test } from "node:test";

import { Herald, Received, send, until } from "./kit.mjs";

test("a restart under load loses nothing that was accepted", async (t) => {
  const herald = await (await Herald.install(t)).start();
  const root = await herald.superuser();
  const got = [];
  for (let i = 0; i < 5; i++) {
    const numbers = [];
    got.push(numbers);
    await herald.client().realtime.subscribe("load", ({ n }) => numbers.push(n));
  }

  const accepted = [];
  let n = 0;
  let stopped;
  for (;;) {
    if (++n === 200) stopped = herald.stop("SIGTERM");
    try {
      await send(root, { topic: "load", data: { n } });
      accepted.push(n);
    } catch (error) {
      assert.ok(stopped, `message ${n} was refused: ${error}`);
      break;
    }
  }
  await stopped;
  assert.ok(accepted.length >= 199);
  for (const numbers of got) {
    await until(`all ${accepted.length} have arrived`, () => numbers.length >= accepted.length);
    assert.deepEqual(numbers.slice(0, accepted.length), accepted);
  }

  await herald.start();
  await until("all are back", async () => (await send(root, { topic: "load", data: { n: -1 } })).queued === 5);
  for (const numbers of got) await until("it goes on", () => numbers.at(-1) === -1);
});

test("the file-descriptor limit is told", async (t) => {
  const herald = await Herald.install(t);
  herald.maxFiles = 60;
  await herald.start();
  const sockets = [];
  t.after(() => sockets.forEach((socket) => socket.destroy()));
  for (let i = 0; i < 60; i++) {
    const socket = connect(herald.port, "127.0.0.1");
    socket.on("error", () => {});
    sockets.push(socket);
  }
  await until("the log tells it", () => herald.output.includes("out of file descriptors"));
  for (const socket of sockets) socket.destroy();
  await until("the server answers again", () => fetch(`${herald.url}/api/health`).then((response) => response.ok, () => false));
});

test("realtime handlers in pb_hooks", async (t) => {
  const herald = await Herald.install(t);
  await mkdir(join(herald.folder, "pb_hooks"));
  await writeFile(join(herald.folder, "pb_hooks/realtime.pb.js"), `
    onRealtimeConnectRequest((e) => {
      e.next();
      console.log("left after e.next()");
    });
    onRealtimeMessageSend((e) => {
      if (e.message.name === "secret") return; // stops it
      if (e.message.name === "open") e.message.data = JSON.stringify({ changed: true });
      e.next();
    });
  `);
  await herald.start();
  const root = await herald.superuser();
  const client = herald.client();
  const secret = await Received.on(client, "secret");
  const open = await Received.on(client, "open");
  await send(root, { topic: "secret", data: { n: 1 } });
  await send(root, { topic: "open", data: { n: 2 } });
  assert.deepEqual(await open.next(), { changed: true });
  assert.equal(secret.waiting, 0);
  assert.ok(!herald.output.includes("left after"));
  await client.realtime.unsubscribe(); // disconnects
  await until("the handler goes on", () => herald.output.includes("left after e.next()"));
});
