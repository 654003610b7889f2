// An origin and edges as processes, with stock clients: what happens when one of them
// stops, for a while or for good.

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { test } from "node:test";

import { presence, subscribe } from "../clients/js/herald.js";
import { addUser, freePort, Herald, Received, send, until } from "./kit.mjs";

/** An origin with two edges, a superuser's client that uses the first, and a channel with history. */
async function install(t) {
  const herald = await Herald.install(t);
  await herald.startOrigin();
  const root = await herald.superuser();
  await root.collection("notify_channels").create({ pattern: "log/{name}", subscribeRule: "*", history: 100_000, presence: true, presenceRule: "*" });
  const edges = [await herald.edge("first"), await herald.edge("second")];
  return { herald, root, edges };
}

/** Counts how often a client has connected. */
async function connects(client) {
  const count = { times: 0 };
  await client.realtime.subscribe("PB_CONNECT", () => count.times++);
  return count;
}

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

/** Sends numbers to a topic until it is stopped, each until it is answered. */
function sendNumbers(root, topic, every = 10) {
  let running = true, sent = 0;
  const sending = (async () => {
    for (; running; sent++) {
      while (!(await send(root, { topic, data: sent + 1, id: `n${sent}` }).catch(() => null))) await pause(20);
      await pause(every);
    }
  })();
  return { get sent() { return sent; }, stop: async () => { running = false; await sending; return sent; } };
}

const numbers = (count) => Array.from({ length: count }, (_, i) => i + 1); // the SDK takes 0 for nothing

test("an origin and two edges", async (t) => {
  const { herald, root, edges } = await install(t);
  await addUser(root, "ann@example.com", { name: "Ann" });
  const [ann, bob] = edges.map((edge) => herald.client(edge.url));
  await ann.collection("users").authWithPassword("ann@example.com", "1234567890");
  const got = [await Received.on(ann, "example"), await Received.on(bob, "example"), await Received.on(herald.client(), "example")];
  await send(root, { topic: "example", data: "to all" });
  for (const received of got) assert.equal(await received.next(), "to all");
  await send(root, { topic: "example", data: "to ann", to: { users: [`users:${ann.authStore.record.id}`] } });
  assert.equal(await got[0].next(), "to ann");

  // record events, over PocketBase's own subscription
  const records = await Received.on(ann, `users/${ann.authStore.record.id}`);
  await ann.collection("users").update(ann.authStore.record.id, { name: "Anna" });
  const event = await records.next();
  assert.equal(event.action, "update");
  assert.equal(event.record.name, "Anna");

  // who is present, across edges
  const present = await presence(ann, "log/here", {});
  const also = await presence(bob, "log/here", {});
  await until("both know", () => present.size === 1 && also.size === 1 && present.guests === 1);
  await present.leave();
  await also.leave();
  const clients = await root.send("/api/notify/clients", {});
  assert.deepEqual(clients.items.map(({ edge }) => edge).sort(), ["first", "second", undefined]);
});

for (const signal of ["SIGTERM", "SIGKILL"]) {
  test(`nobody notices that the origin restarts: ${signal}`, async (t) => {
    const { herald, root, edges } = await install(t);
    const stock = edges.map((edge) => herald.client(edge.url));
    const counts = await Promise.all(stock.map(connects));
    const logs = stock.map(() => []);
    await Promise.all(stock.map((client, i) => client.realtime.subscribe("log/a", (data) => logs[i].push(data))));
    const own = { data: [], gaps: [], states: [] };
    const module = herald.client(edges[0].url);
    const stop = await subscribe(module, "log/a", ({ data }) => own.data.push(data), {
      onGap: (gap) => own.gaps.push(gap), onState: (state) => own.states.push(state),
    });
    t.after(stop);
    await until("it is live", () => own.states.at(-1) === "live");
    const states = own.states.length;
    await addUser(root, "ann@example.com");
    const ann = herald.client(edges[1].url);
    await ann.collection("users").authWithPassword("ann@example.com", "1234567890");
    await ann.realtime.subscribe("log/a", () => {});
    const left = [];
    const present = await presence(module, "log/a", { join: false, onChange: ({ leave }) => left.push(...leave) });
    t.after(() => present.leave());
    await until("she is seen", () => present.size === 1);

    const sending = sendNumbers(root, "log/a");
    t.after(() => sending.stop());
    for (let i = 0; i < 2; i++) {
      const before = sending.sent;
      await until("numbers are sent", () => sending.sent > before + 50);
      await herald.stop(signal);
      await herald.startOrigin();
    }
    const before = sending.sent;
    await until("numbers are sent", () => sending.sent > before + 50);
    const count = await sending.stop();
    await until("all have all", () => [...logs, own.data].every((log) => log.length >= count));
    for (const log of [...logs, own.data]) assert.deepEqual(log, numbers(count));
    assert.deepEqual(own.gaps, []);
    assert.equal(own.states.length, states, `herald.js noticed: ${own.states}`);
    assert.deepEqual(counts.map(({ times }) => times), [1, 1], "a client had to connect again");
    assert.equal(present.size, 1);
    assert.deepEqual(left, [], "somebody left");
  });
}

test("nobody vanishes from a room when the origin restarts", async (t) => {
  const { herald, root, edges } = await install(t);
  const count = Number(process.env.MEMBERS ?? 30); // each needs a password to be hashed
  const emails = Array.from({ length: count }, (_, i) => `member${i}@example.com`);
  for (const email of emails) await addUser(root, email);
  const told = [];
  const watch = async (edge) => {
    const client = herald.client(edge.url);
    const counts = await connects(client);
    await client.realtime.subscribe("@presence/log/a", (message) => told.push(message));
    return counts;
  };
  // a watcher is announced before all others, and one after them
  const counts = [await watch(edges[0])];
  for (const [i, email] of emails.entries()) {
    const member = herald.client(edges[i % 2].url);
    await member.collection("users").authWithPassword(email, "1234567890");
    await member.realtime.subscribe("log/a", () => {});
  }
  counts.push(await watch(edges[1]));
  await until("both know them", () => told.filter(({ total }) => total === count).length >= 2);
  for (const signal of ["SIGKILL", "SIGTERM"]) {
    told.length = 0;
    await herald.stop(signal);
    await herald.startOrigin();
    await until("both hear again", () => told.length >= 2);
    await until("all are back", async () => (await root.send("/api/notify/clients", {})).totalItems === count + 2);
    await pause(500); // what is told later is told within this time
    for (const message of told) assert.deepEqual([message.total, message.leave ?? []], [count, []]);
  }
  assert.deepEqual(counts.map(({ times }) => times), [1, 1]);
});

test("a process that is stopped for a while", async (t) => {
  const { herald, root, edges } = await install(t);
  const kept = await Promise.all(edges.map(async ({ url }) => {
    const client = herald.client(url);
    return { client, counts: await connects(client), received: [] };
  }));
  await Promise.all(kept.map(({ client, received }) => client.realtime.subscribe("log/a", (data) => received.push(data))));
  const other = herald.client(edges[0].url); // listens to what is not kept
  const otherCounts = await connects(other);
  const unkept = [];
  await other.realtime.subscribe("example", (data) => unkept.push(data));

  // what is short is not noticed, whatever stops
  let sent = 0;
  for (const [stopped, seconds] of [[edges[0], 2], [herald, 5]]) {
    stopped.process.kill("SIGSTOP");
    const answers = [send(root, { topic: "log/a", data: ++sent }), send(root, { topic: "example", data: "now" })];
    if (stopped === herald) {
      await until("the edges notice", async () => (await fetch(`${edges[0].url}/api/health`)).status === 503);
    }
    await pause(seconds * 1000);
    stopped.process.kill("SIGCONT");
    await Promise.all(answers);
    await until("the edges are healthy", async () => (await fetch(`${edges[0].url}/api/health`)).ok);
    await until("all have it", () => unkept.length === sent && kept.every(({ received }) => received.length === sent));
  }
  assert.deepEqual([otherCounts, ...kept.map(({ counts }) => counts)].map(({ times }) => times), [1, 1, 1]);

  // an edge that the origin has given up: what is kept is delivered, and who cannot have all connects anew
  edges[0].process.kill("SIGSTOP");
  await until("the origin gives it up", async () => (await root.send("/api/notify/stats", {})).edges.length === 1);
  await send(root, { topic: "log/a", data: ++sent });
  await send(root, { topic: "example", data: "lost" });
  await until("the others go on", () => kept[1].received.length === sent);
  edges[0].process.kill("SIGCONT");
  await until("what is kept comes", () => kept[0].received.length === sent);
  await until("who has lost something connects anew", () => otherCounts.times === 2);
  assert.deepEqual(kept.map(({ received }) => received), [numbers(sent), numbers(sent)]);
  assert.deepEqual(kept.map(({ counts }) => counts.times), [1, 1]);

  // an edge that is gone: its clients are, too, and it can come back at once
  await edges[0].stop("SIGKILL");
  await edges[0].start();
  await until("they are back", () => kept[0].counts.times === 2 && otherCounts.times === 3);
  await until("there are no ghosts", async () => (await root.send("/api/notify/clients", {})).totalItems === 3);
  await send(root, { topic: "example", data: "again" });
  await until("it comes", () => unkept.at(-1) === "again");
});

test("an edge that no origin wants", async (t) => {
  const { herald, edges } = await install(t);
  const wrong = async (...args) => herald.command("edge", ...args).then(() => assert.fail(`${args} is accepted`), (error) => [error.code, error.stderr]);
  assert.match((await wrong())[1], /--nats is missing/);
  assert.deepEqual((await wrong("--nats", "nats://127.0.0.1:1", "--origin", "")).at(0), 2);
  assert.match((await wrong("--nats", "nats://127.0.0.1:1", "--origin", "10.0.0.1"))[1], /not an address/);
  assert.match((await wrong("--nats", "nats://127.0.0.1:1", "--name", "a b"))[1], /letters, digits/);
  assert.match((await wrong("--nats", `nats://${herald.nats}`, `--http=127.0.0.1:${edges[0].port}`))[1], /in use/);
});

test("a NATS server that is not there", async (t) => {
  const herald = await Herald.install(t);
  const address = "nats://ann:secret@127.0.0.1:1";
  await herald.start(`--notifyNATS=${address}`);
  const edge = spawn(herald.executable, ["edge", `--nats=${address}`, `--http=127.0.0.1:${await freePort()}`], { env: herald.env });
  t.after(() => edge.kill("SIGKILL"));
  let says = "";
  edge.stderr.on("data", (text) => (says += text));
  for (const text of [() => herald.output, () => says]) {
    await until("it is said", () => /NATS cannot be reached yet, .*: nats:\/\/127\.0\.0\.1:1\b/.test(text()));
    assert.doesNotMatch(text(), /secret/);
  }
});

// too long for each run: see make chaos
if (process.env.EDGE_LONG) test("a process that is stopped for long", async (t) => {
  const { herald, root, edges } = await install(t);
  const client = herald.client(edges[0].url);
  const counts = await connects(client);
  const own = { data: [], gaps: [] };
  t.after(await subscribe(herald.client(edges[0].url), "log/a", ({ data }) => own.data.push(data), { onGap: (gap) => own.gaps.push(gap) }));
  const received = await Received.on(client, "log/a");
  let sent = 0;
  for (const [name, stopped, seconds] of [["the origin", herald, 15], ["an edge", edges[0], 15], ["an edge", edges[0], 70], ["the origin", herald, 75]]) {
    const before = counts.times;
    stopped.process.kill("SIGSTOP");
    const answer = send(root, { topic: "log/a", data: ++sent });
    await pause(seconds * 1000);
    stopped.process.kill("SIGCONT");
    await answer;
    await until("the edge is healthy", async () => (await fetch(`${edges[0].url}/api/health`)).ok);
    await until(`herald.js has all after ${name} was stopped for ${seconds} s`, () => own.data.length === sent);
    t.diagnostic(`${name} stopped for ${seconds} s: the stock client connected ${counts.times - before} times more`);
    if (seconds < 60) {
      assert.equal(counts.times, before);
      assert.equal(await received.next(), sent);
    } else {
      await until("the client is back", async () => (await root.send("/api/notify/clients", { requestKey: null })).totalItems === 2);
      while (received.waiting) await received.next();
    }
  }
  assert.deepEqual(own.data, numbers(sent));
  assert.deepEqual(own.gaps, []);
});
