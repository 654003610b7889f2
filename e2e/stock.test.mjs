// Herald in the place of PocketBase's own executable, which is built here from
// the module's examples/base for comparison.

import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { mkdir, mkdtemp, readdir, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { promisify } from "node:util";

import { addUser, Herald, password, Received, root as repository, send, until } from "./kit.mjs";

const run = promisify(execFile);
let folder;
let stock; // path of PocketBase's executable in folder

before(async () => {
  folder = await mkdtemp(join(tmpdir(), "pocketbase-"));
  stock = join(folder, "pocketbase");
  await run("go", ["build", "-o", stock, "github.com/pocketbase/pocketbase/examples/base"], {
    cwd: repository, env: { ...process.env, GOTOOLCHAIN: "auto", CGO_ENABLED: "0" },
  });
});
after(() => rm(folder, { recursive: true, force: true }));

test("has every command and flag of the stock executable, with its default", async (t) => {
  const herald = await Herald.install(t);
  const pocketbase = await Herald.install(t, stock);

  const parse = (help) => ({
    commands: [...help.matchAll(/^  ([a-z]+)\s{2,}\S/gm)].map((match) => match[1]),
    flags: [...help.matchAll(/^\s+(?:-\w, )?(--\w+.*?)(?=\n\s+-|\n\n|\n*$)/gms)].map((match) => match[1].replace(/\s+/g, " ").trim()),
  });
  for (const args of [["--help"], ["serve", "--help"], ["superuser", "--help"], ["migrate", "--help"]]) {
    const clean = (text, folder) => text.replaceAll(folder, "FOLDER").replaceAll("pocketbase", "herald");
    const mine = parse(clean(await herald.command(...args), herald.folder));
    const theirs = parse(clean(await pocketbase.command(...args), pocketbase.folder));
    assert.ok(theirs.flags.length > 5, `flags of ${args}: ${theirs.flags}`);
    for (const flag of theirs.flags.filter((flag) => !/version/.test(flag))) assert.ok(mine.flags.includes(flag), `${args}: ${flag} in ${mine.flags.join("\n")}`);
    // no self-update: it would put the stock executable in Herald's place
    assert.deepEqual(theirs.commands.filter((command) => !mine.commands.includes(command)), args[0] === "--help" ? ["update"] : []);
  }
  assert.match(await herald.command("--version"), /PocketBase v0\.40/);
});

test("serves from an empty folder", async (t) => {
  const herald = await (await Herald.install(t)).start();
  const page = await fetch(`${herald.url}/`);
  assert.match(await page.text(), /Herald/);
  assert.match(page.headers.get("content-security-policy"), /script-src 'self'/);
  assert.equal((await fetch(`${herald.url}/herald/pocketbase.es.mjs`)).status, 200);
  assert.equal((await fetch(`${herald.url}/_/`)).status, 200);
  assert.equal((await fetch(`${herald.url}/nope`)).status, 404);
});

test("static files, JS hooks and JS migrations", async (t) => {
  const herald = await Herald.install(t);
  for (const folder of ["pb_public", "pb_hooks", "pb_migrations"]) await mkdir(join(herald.folder, folder));
  await writeFile(join(herald.folder, "pb_public/index.html"), "my application");
  await writeFile(join(herald.folder, "pb_hooks/main.pb.js"), `
    routerAdd("GET", "/hello/{name}", (e) => e.json(200, { hello: e.request.pathValue("name") }));
    onRecordCreate((e) => { e.record.set("title", e.record.get("title") + "!"); e.next(); }, "posts");
    onRealtimeMessageSend((e) => {
      if (e.message.name === "hooked") e.message.data = JSON.stringify({ changed: true });
      e.next();
    });
    routerAdd("POST", "/snippet", (e) => {
      const message = new SubscriptionMessage({ name: "snippet", data: JSON.stringify({ n: 1 }) });
      const clients = $app.subscriptionsBroker().clients();
      for (const id in clients) if (clients[id].hasSubscription("snippet")) clients[id].send(message);
      return e.noContent(204);
    });
  `);
  await writeFile(join(herald.folder, "pb_migrations/1700000000_posts.js"), `
    migrate((app) => {
      app.save(new Collection({ type: "base", name: "posts", listRule: "", viewRule: "", createRule: "",
        fields: [{ type: "text", name: "title" }] }));
    }, (app) => app.delete(app.findCollectionByNameOrId("posts")));
  `);
  await herald.start();
  const root = await herald.superuser();

  await t.test("static files", async () => {
    assert.equal(await (await fetch(`${herald.url}/`)).text(), "my application");
    const fallback = await fetch(`${herald.url}/some/route`);
    assert.equal(await fallback.text(), "my application");
    assert.equal(fallback.headers.get("content-security-policy"), null);
  });

  await t.test("hooks and migrations", async () => {
    assert.deepEqual(await root.send("/hello/ann", {}), { hello: "ann" });
    const visitor = herald.client();
    const events = await Received.on(visitor, "posts/*");
    await visitor.collection("posts").create({ title: "first" });
    const event = await events.next();
    assert.deepEqual([event.action, event.record.title], ["create", "first!"]);
    await visitor.realtime.unsubscribe();
  });

  await t.test("realtime from JS hooks", async () => {
    const visitor = herald.client();
    const hooked = await Received.on(visitor, "hooked");
    await send(root, { topic: "hooked", data: { changed: false } });
    assert.deepEqual(await hooked.next(), { changed: true });
    const snippet = await Received.on(visitor, "snippet");
    await root.send("/snippet", { method: "POST" });
    assert.deepEqual(await snippet.next(), { n: 1 });
    await visitor.realtime.unsubscribe();
  });

  await t.test("automigrate writes a JS migration", async () => {
    const migrations = join(herald.folder, "pb_migrations");
    await root.collections.create({ type: "base", name: "made", fields: [{ type: "text", name: "x" }] });
    await until("the migration is written", async () => (await readdir(migrations)).some((name) => /_created_made\.js$/.test(name)));
  });

  await t.test("migrate up", async () => {
    await herald.stop();
    assert.match(await herald.command("migrate", "up"), /No new migrations/);
  });
});

test("flags", async (t) => {
  const herald = await Herald.install(t);
  await mkdir(join(herald.folder, "site"));
  await writeFile(join(herald.folder, "site/index.html"), "the site");
  await herald.start("--publicDir=site", "--indexFallback=false", "--notifyMaxSize=10", "--automigrate=false", "--hooksWatch=false",
    "--hooksPool=3", "--hooksDir=site", "--migrationsDir=site", `--dir=${join(herald.folder, "elsewhere")}`);
  assert.equal(await (await fetch(`${herald.url}/`)).text(), "the site");
  assert.equal((await fetch(`${herald.url}/nope`)).status, 404);
  assert.ok((await readdir(herald.folder)).includes("elsewhere"));

  await herald.command("superuser", "upsert", "root@example.com", password, `--dir=${join(herald.folder, "elsewhere")}`);
  const root = herald.client();
  await root.collection("_superusers").authWithPassword("root@example.com", password);
  await assert.rejects(send(root, { topic: "x", data: "0123456789" }), (error) => error.status === 413);
  assert.equal((await send(root, { topic: "x", data: "01234567" })).matched, 0);
});

test("takes over an application of the stock executable", async (t) => {
  const pocketbase = await (await Herald.install(t, stock)).start();
  let root = await pocketbase.superuser();
  await addUser(root, "ann@example.com");
  await root.collections.create({ type: "base", name: "notifications", listRule: "", viewRule: "", fields: [{ type: "text", name: "mine" }] });
  const { id } = await root.collection("notifications").create({ mine: "kept" });
  await pocketbase.stop();

  const herald = await Herald.install(t);
  await herald.start(`--dir=${join(pocketbase.folder, "pb_data")}`);
  const ann = await herald.signIn("ann@example.com");
  assert.equal((await ann.collection("notifications").getOne(id)).mine, "kept");
  root = herald.client();
  await root.collection("_superusers").authWithPassword("root@example.com", password);

  const events = await Received.on(ann, "notifications/*");
  const inbox = await Received.on(ann, "@inbox");
  await root.collection("notifications").create({ mine: "new" });
  assert.equal((await events.next()).record.mine, "new");
  const custom = await Received.on(ann, "example");
  await send(root, { topic: "example", data: { n: 1 } });
  assert.deepEqual(await custom.next(), { n: 1 });
  assert.equal(inbox.waiting, 0); // that collection is not Herald's
  await until("the log tells that the inbox is off", async () => {
    const logs = await root.logs.getList(1, 1, { filter: 'message ~ "inbox is off"', requestKey: null });
    return logs.items[0]?.message.includes("of its own");
  });
  await ann.realtime.unsubscribe();

  // and back: the stock executable finds its application unharmed
  await herald.stop();
  await pocketbase.start();
  assert.equal((await pocketbase.client().collection("notifications").getOne(id)).mine, "kept");
});
