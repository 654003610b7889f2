// kill -9 under load: what was answered is not lost, what was delivered is stored, no
// number is given out twice. Seen from the outside, with real clients.

import assert from "node:assert/strict";
import { test } from "node:test";

import { subscribe } from "../clients/js/herald.js";
import { Herald, send, until } from "./kit.mjs";

test("kill -9 under load", async (t) => {
  const kills = Number(process.env.CRASHES || 5), senders = 8; // 50 in make chaos
  const herald = await (await Herald.install(t)).start();
  const root = await herald.superuser();
  await root.collection("notify_channels").create({ pattern: "log", subscribeRule: "*", history: 1_000_000 });

  // a client that sees each message as it is delivered, anew after each crash, and one
  // of herald.js
  const delivered = [];
  let watcher;
  const watch = async () => {
    await watcher?.realtime.unsubscribe();
    watcher = herald.client();
    await watcher.realtime.subscribe("log", (message) => delivered.push(message), { query: { envelope: true } });
  };
  await watch();
  const recovered = [], gaps = [];
  const stop = await subscribe(herald.client(), "log", (message) => recovered.push(message), { onGap: (gap) => gaps.push(gap) });
  t.after(stop);

  let running = true, over = false;
  t.after(() => (over = true));
  const answers = []; // {id, epoch, seq, data} of each message that was answered
  let tries = 0;
  const sending = Array.from({ length: senders }, async (_, sender) => {
    for (let n = 0; running && !over; n++) {
      const message = { topic: "log", data: `${sender}/${n}`, id: `${sender}-${n}` };
      while (!over) { // until there is an answer, with the same id: safe, says the contract
        tries++;
        const answer = await send(root, message).catch(() => null);
        if (answer) {
          answers.push({ ...answer, data: message.data });
          break;
        }
        await new Promise((resolve) => setTimeout(resolve, 20));
      }
    }
  });
  for (let i = 0; i < kills; i++) {
    const before = answers.length;
    await until("messages are sent", () => answers.length > before + 20);
    await new Promise((resolve) => setTimeout(resolve, Math.random() * 200)); // at any point
    await herald.stop("SIGKILL");
    await herald.start();
    await watch();
  }
  running = false;
  await Promise.all(sending);

  const history = [];
  let position = "", epoch = "";
  for (;;) {
    const page = await root.send("/api/notify/history", { query: { topic: "log", limit: 1000, since: position }, requestKey: null });
    history.push(...page.items);
    assert.ok(!epoch || epoch === page.epoch);
    ({ epoch, next: position } = page);
    if (page.next === `${page.epoch}:${page.head}`) break;
  }
  const stored = new Map(history.map((item) => [item.seq, item]));
  const count = history.length;
  assert.deepEqual(history.map(({ seq }) => seq), Array.from({ length: count }, (_, i) => i + 1), "numbers have holes");
  assert.equal(new Set(history.map(({ id }) => id)).size, count, "a retry was stored twice");
  for (const { id, seq, epoch: answered, data } of answers) {
    assert.equal(answered, epoch);
    assert.deepEqual([stored.get(seq)?.id, stored.get(seq)?.data], [id, data], `the answered message ${seq} is lost`);
  }
  for (const message of delivered) {
    assert.deepEqual([message.epoch, stored.get(message.seq)?.id], [epoch, message.id], `the delivered message ${message.seq} is not stored`);
  }
  await until("herald.js has all", () => recovered.length >= count);
  assert.deepEqual(recovered.map(({ seq, id }) => [seq, id]), history.map(({ seq, id }) => [seq, id]));
  assert.deepEqual(gaps, []);
  t.diagnostic(`${count} messages, ${tries - answers.length} tries without an answer, ${delivered.length} delivered at once, ` +
    `${recovered.filter(({ replayed }) => replayed).length} recovered`);
});
