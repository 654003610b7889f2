// What the documentation shows, run as it is written: each snippet of README and docs.

import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { readdirSync, readFileSync } from "node:fs";
import { access, cp, mkdir, mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { dirname, join, relative } from "node:path";
import { test } from "node:test";
import { promisify } from "node:util";

import { parse } from "acorn";
import { get } from "svelte/store";
import { build } from "vite";

import * as module from "../clients/js/herald.js";
import { addUser, Herald, launchBrowser, password, Received, root, send, until } from "./kit.mjs";

const run = promisify(execFile);

const pages = ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "clients/js/README.md", "examples/chat/README.md", "examples/jobs/README.md",
  ...readdirSync(join(root, "docs")).filter((name) => name.endsWith(".md")).map((name) => `docs/${name}`)];
const text = Object.fromEntries(pages.map((page) => [page, readFileSync(join(root, page), "utf8")]));
const snippets = pages.flatMap((page) => [...text[page].matchAll(/^```(\S*)\n(.*?)^```/gms)].map(([, language, code]) => ({ page, language, code })));
const of = (language) => snippets.filter((snippet) => snippet.language === language);

test("herald.js is written in no newer JavaScript than the SDK", () => {
  const parses = (path, ecmaVersion) => {
    try {
      return Boolean(parse(readFileSync(join(root, path), "utf8"), { ecmaVersion, sourceType: "module" }));
    } catch {
      return false;
    }
  };
  for (const sdk of ["pocketbase", "pocketbase-oldest"]) {
    const age = [2015, 2016, 2017, 2018, 2019, 2020, 2021, 2022].find((version) => parses(`node_modules/${sdk}/dist/pocketbase.es.mjs`, version));
    assert.ok(parses("clients/js/herald.js", age), `${sdk} is ES${age}`);
  }
});

test("the README is short, and links lead somewhere", async () => {
  assert.ok(text["README.md"].split("\n").length <= 200);
  for (const page of pages) {
    for (const [, target] of text[page].replaceAll(/```.*?```/gs, "").matchAll(/\]\(([^)\s]+)\)/g)) {
      if (/^(https?:|mailto:)/.test(target)) continue;
      const [file, anchor] = target.split("#");
      const path = file ? join(dirname(page), file) : page;
      await access(join(root, path)).catch(() => assert.fail(`${page} links to ${target}, which does not exist`));
      if (!anchor) continue;
      const anchors = [...text[path].matchAll(/^#+ (.*)$/gm)].map(([, heading]) => heading.toLowerCase().replace(/[^\w\s-]/g, "").replace(/\s/g, "-"));
      assert.ok(anchors.includes(anchor), `${page} links to ${target}: there are ${anchors}`);
    }
  }
});

test("snippets are in languages that are run", () => {
  // diagrams have none; the configurations of proxies are run by proxies.test.mjs
  const languages = new Set(snippets.map(({ language }) => language));
  assert.deepEqual([...languages].sort(), ["", "caddy", "go", "js", "json", "nginx", "sh"]);
});

test("JSON", () => {
  for (const { page, code } of of("json")) {
    // several values in a snippet begin on lines of their own
    for (const value of code.trim().split(/\n(?=\{)/)) assert.doesNotThrow(() => JSON.parse(value), `${page}: ${value}`);
  }
});

test("Go", async (t) => {
  const folder = await mkdtemp(join(root, ".snippets-")); // within the module, and no package of it
  t.after(() => rm(folder, { recursive: true, force: true }));
  const functions = of("go").map(({ code }, i) => `func snippet${i}(app *pocketbase.PocketBase, ctx context.Context, data any) (result any) {
    ${code.replace(/^report, err := /m, "report, err = ").replace(/^err := /m, "var report notify.Report\n_ = report\nerr := ")}
    ${/^err := /m.test(code) ? "return err" : "return nil"}
  }`);
  await writeFile(join(folder, "main.go"), `package main
    import ("context"; "github.com/pocketbase/pocketbase"; "github.com/pocketbase/pocketbase/core"; "herald/hooks"; "herald/notify")
    var _ core.App
    ${functions.join("\n")}
    func main() {}`);
  assert.ok(functions.length >= 6);
  await run("go", ["build", "-o", "/dev/null", "./" + relative(root, folder)], { cwd: root, env: { ...process.env, GOTOOLCHAIN: "auto" } });
});

/** A server with what the documentation takes for granted: a chat with members, orders, and a plan of users. */
async function start(t, prepare = async () => {}) {
  const herald = await Herald.install(t);
  await prepare(herald);
  await herald.start();
  const superuser = await herald.superuser();
  const users = await superuser.collections.getOne("users");
  await superuser.collections.update("users", { fields: [...users.fields, { name: "plan", type: "text" }, { name: "muted", type: "bool" }] });
  const ann = await addUser(superuser, "ann@example.com", { name: "Ann", plan: "pro", verified: true });
  await superuser.collections.create({ name: "room_members", type: "base", fields: [
    { name: "room", type: "text" }, { name: "user", type: "relation", collectionId: users.id, maxSelect: 1 }] });
  await superuser.collection("room_members").create({ room: "42", user: ann.id });
  const member = "@collection.room_members.room ?= @request.query.room && @collection.room_members.user ?= @request.auth.id";
  assert.ok(text["README.md"].includes(member) && text["docs/recipes.md"].includes(member));
  await superuser.collection("notify_channels").create({
    pattern: "chat/{room}", subscribeRule: member, publishRule: member, history: 100, presence: true, presenceRule: member, presenceFields: "name" });
  const client = herald.client();
  await client.collection("users").authWithPassword("ann@example.com", password);
  return { herald, superuser, client, ann };
}

const isHook = (code) => /^(on[A-Z]\w+|cronAdd|routerAdd)\(|^\$notify/m.test(code);

/** Code of a hook that is no handler itself, and is run in one. */
const isInHandler = (code) => /^\$notify|= \$notify/m.test(code);

test("JavaScript of clients", async (t) => {
  const { herald, client } = await start(t);
  const ran = [];
  for (const { page, code } of of("js")) {
    if (isHook(code) || /from "(react|svelte|eventsource)/.test(code) || code.startsWith("///")) continue;
    const called = [];
    const stubs = { // what an application has: everything that is called by another name is noted
      pb: client, PocketBase: function () { return client; }, ...module, shareConnection: () => false,
      localStorage: { getItem: () => null, setItem() {} }, input: {}, leaveButton: {}, callback() {}, text: "Hi",
      console: { log: (...args) => called.push(args) }, setTimeout, clearTimeout, encodeURIComponent, Map, JSON,
    };
    const scope = new Proxy(stubs, {
      has: () => true,
      get: (_, name) => (name === Symbol.unscopables ? undefined : name in stubs ? stubs[name] : (...args) => called.push([name, ...args])),
    });
    const body = code.replace(/^import .*$/gm, "").replace('"EPOCH:SEQ"', '"epoch:1"').replace(/^const pb = /m, "pb = ");
    const f = new Function("scope", `with (scope) { return (async () => { ${body}\n })(); }`);
    await f(scope).catch((error) => assert.fail(`${page}: ${error.message}\n${code}`));
    ran.push(page);
  }
  assert.ok(ran.length >= 15, `ran ${ran}`);
  client.realtime.unsubscribe();
});

test("JavaScript of hooks", async (t) => {
  const hooks = of("js").filter(({ code }) => isHook(code)).map(({ code }) => code);
  assert.ok(hooks.length >= 4);
  const { client } = await start(t, async (herald) => {
    await mkdir(join(herald.folder, "pb_hooks"));
    for (const [i, code] of hooks.entries()) {
      // what is not a handler itself is run in one
      const handlers = code.split("\n").filter((line) => /^on[A-Z]/.test(line) && line.includes("});"));
      const rest = code.split("\n").filter((line) => !handlers.includes(line)).join("\n");
      await writeFile(join(herald.folder, `pb_hooks/snippet${i}.pb.js`), !isInHandler(code) ? code
        : `${handlers.join("\n")}\nrouterAdd("GET", "/snippet/${i}", (e) => { ${rest}\n return e.json(200, ${i}) }, $apis.requireAuth());`);
    }
  });
  for (const [i, code] of hooks.entries()) {
    if (isInHandler(code)) assert.equal(await client.send(`/snippet/${i}`, {}), i);
  }
  const got = await Received.on(client, "chat/42");
  await client.send("/api/notify/publish", { method: "POST", body: { topic: "chat/42", data: { text: "Hi", name: "Bob" } } });
  assert.deepEqual(await got.next(), { text: "Hi", name: "Ann" });
});

test("commands", async (t) => {
  const { herald, superuser, client, ann } = await start(t);
  await client.realtime.subscribe("chat/42", () => {});
  const announced = await Received.on(client, "announcements");
  const token = superuser.authStore.token;
  await writeFile(join(herald.folder, "offer.json"), '{"percent": 10}');
  const env = { ...herald.env, TOKEN: token, HERALD_URL: herald.url, PATH: `${herald.folder}:${process.env.PATH}` };
  const shell = (command) => run("bash", ["-euo", "pipefail", "-c", command], { cwd: herald.folder, env });
  const elsewhere = [ // run by other tests, or run them
    /^make /m, /^npm /m, /^go test/m, /superuser upsert/, /^TOKEN=/m, /^herald (serve|edge) /m,
  ];
  let count = 0;
  for (const { page, code } of of("sh")) {
    if (elsewhere.some((pattern) => pattern.test(code))) continue;
    const adapted = code.replaceAll("http://127.0.0.1:8090", herald.url).replaceAll("users:ID", `users:${ann.id}`).replaceAll("CLIENT_ID", client.realtime.clientId)
      .replaceAll("--clients 1000", "--clients 20").replaceAll("jq .data", "cat");
    // a command a line, in cli.md; elsewhere one that goes over lines
    for (const command of page === "docs/cli.md" ? adapted.trim().split("\n") : [adapted]) {
      const isTail = command.includes(" tail ");
      const { stdout } = await shell(isTail ? command.replace(/herald notify tail ([^|#]*)/, "timeout -s INT 2 herald notify tail $1 ") : command).catch((error) => {
        if (isTail && [124, 130].includes(error.code)) return error; // it was ended
        assert.fail(`${page}: ${command}: ${error.message} ${error.stdout}`);
      });
      assert.ok(isTail || stdout || command.includes("kick"), `${page}: ${command} printed nothing`);
      count++;
    }
  }
  assert.ok(count >= 12, `ran ${count}`);
  assert.deepEqual(await announced.next(), { text: "Version 2 is out" });
});

test("React, Svelte and React Native", async (t) => {
  const [react, svelte, native] = [/from "react"/, /from "svelte/, /from "react-native-sse"/].map((pattern) => of("js").find(({ code }) => pattern.test(code)).code);
  const { herald, superuser, client } = await start(t);
  for (const n of [1, 2]) await send(superuser, { topic: "chat/42", data: { text: `before ${n}` } });

  const folder = await mkdtemp(join(root, "e2e/output-")); // beside node_modules
  t.after(() => rm(folder, { recursive: true, force: true }));
  await writeFile(join(folder, "store.mjs"), svelte);
  await writeFile(join(folder, "topic.js"), react);
  await writeFile(join(folder, "native.js"), native);
  await writeFile(join(folder, "index.html"), '<link rel="icon" href="data:,"><main></main><pre></pre><script type="module" src="/main.js"></script>');
  await writeFile(join(folder, "main.js"), `
    import { createElement, StrictMode } from "react";
    import { createRoot } from "react-dom/client";
    import PocketBase from "pocketbase";
    import { subscribe } from "herald-pocketbase";
    import { useTopic } from "./topic.js";
    const signIn = async () => {
      const pb = new PocketBase(location.origin, null);
      await pb.collection("users").authWithPassword("ann@example.com", ${JSON.stringify(password)});
      return pb;
    };
    const pb = await signIn();
    const List = () => createElement("p", null, useTopic(pb, "chat/42").map(({ data }) => data.text).join(", "));
    createRoot(document.querySelector("main")).render(createElement(StrictMode, null, createElement(List)));
    await new Promise((resolve) => { const timer = setInterval(() => document.querySelector("p")?.textContent && resolve(clearInterval(timer)), 20); });
    await import("./native.js"); // from here on, for the next connection
    const got = [];
    await subscribe(await signIn(), "chat/42", ({ data }) => (document.querySelector("pre").textContent = got.push(data.text) && got.join(", ")), { rewind: 2 });
  `);
  await build({
    root: folder, logLevel: "warn", build: { target: "es2022", outDir: "out" },
    // what React Native's bundler makes of its "module.exports = require(…)"
    resolve: { alias: { "react-native-sse": join(root, "node_modules/react-native-sse/src/EventSource.js") } },
  });
  await cp(join(folder, "out"), join(herald.folder, "pb_public"), { recursive: true });
  await herald.stop();
  await herald.start();
  const page = await (await launchBrowser(t)).newPage();
  page.on("pageerror", (error) => assert.fail(error));
  await page.goto(herald.url);
  await page.waitForFunction(() => document.querySelector("pre").textContent === "before 1, before 2");

  const { topicStore } = await import(join(folder, "store.mjs"));
  const store = topicStore(client, "chat/42", 3);
  let latest;
  const stop = store.subscribe((messages) => (latest = messages.map(({ data }) => data.text)));
  await until("the store has them", () => latest.length === 2);
  await send(superuser, { topic: "chat/42", data: { text: "after" } });
  await send(superuser, { topic: "chat/42", data: { text: "last" } });
  await until("the store goes on", () => latest.at(-1) === "last");
  assert.deepEqual(latest, ["before 2", "after", "last"]);
  stop();
  assert.deepEqual(get(store), []);
  for (const selector of ["p", "pre"]) {
    await page.waitForFunction((name) => document.querySelector(name).textContent === "before 1, before 2, after, last", selector);
  }
});
