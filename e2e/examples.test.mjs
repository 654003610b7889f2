// The examples and the npm package, as somebody uses them.

import assert from "node:assert/strict";
import { execFile, spawn } from "node:child_process";
import { cp, mkdir, mkdtemp, readdir, readFile, rm, writeFile } from "node:fs/promises";
import { createServer } from "node:http";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";
import { promisify } from "node:util";

import { build } from "vite";

import { addUser, freePort, Herald, launchBrowser, password, root, send, setClockAhead, until } from "./kit.mjs";

const run = promisify(execFile);

/** A page of a browser's own, whose errors fail the test. */
async function openPage(t, browser, url) {
  const context = await browser.newContext();
  t.after(() => context.close());
  const page = await context.newPage();
  page.on("pageerror", (error) => assert.fail(error));
  await page.goto(url);
  return page;
}

/** Signs in with the form that the examples have. */
async function signIn(page, email) {
  await page.fill("[name=email]", email);
  await page.fill("[name=password]", password);
  await page.click("#sign-in button");
}

test("make demo leaves another server alone", async () => {
  const asked = [];
  const other = createServer((request, response) => {
    asked.push(request.method);
    response.end("{}");
  });
  await new Promise((resolve) => other.listen(0, "127.0.0.1", resolve));
  const { port } = other.address();
  const { code, stderr } = await run(process.execPath, [join(root, "examples/chat/demo.mjs")],
    { env: { ...process.env, HTTP: `127.0.0.1:${port}` } }).catch((error) => error);
  other.close();
  assert.equal(code, 1);
  assert.match(stderr, /already: end it, or choose another address/);
  assert.deepEqual(asked, ["GET"]);
});

test("the chat, by make demo", async (t) => {
  await build({ root: join(root, "examples/chat"), logLevel: "warn" });
  const temporary = await mkdtemp(join(tmpdir(), "herald-examples-"));
  t.after(() => rm(temporary, { recursive: true, force: true }));
  const http = `127.0.0.1:${await freePort()}`;
  const demo = spawn(process.execPath, [join(root, "examples/chat/demo.mjs")], { env: { ...process.env, HTTP: http, TMPDIR: temporary } });
  let out = "";
  demo.stdout.on("data", (data) => (out += data));
  demo.stderr.on("data", (data) => (out += data));
  const ended = new Promise((resolve) => demo.once("exit", resolve));
  t.after(() => demo.kill());
  await until("it is ready", () => {
    assert.equal(demo.exitCode, null, out);
    return out.includes("Ctrl-C");
  });
  const signIns = [...out.matchAll(/(\w+@example\.com) +(\S+)/g)].map(([, email, password]) => ({ email, password })).slice(0, 2);

  const browser = await launchBrowser(t);
  const pages = await Promise.all(signIns.map(async ({ email, password: printed }) => {
    const page = await openPage(t, browser, `http://${http}/#everyone`);
    assert.equal(printed, password);
    await signIn(page, email);
    await page.waitForSelector("#write");
    return page;
  }));
  const [ann, bob] = pages;
  for (const page of pages) await page.waitForFunction(() => document.querySelectorAll("#members li").length === 2);
  await bob.locator("#write input").pressSequentially("almo");
  await ann.waitForFunction(() => document.querySelector("#typing").textContent === "Bob is typing …");
  await ann.fill("#write input", "Is <b>it</b> done?");
  await ann.click("#write button");
  await bob.fill("#write input", "Almost");
  await bob.click("#write button");
  const texts = (page) => page.$$eval("#messages li", (items) => items.map((item) => `${item.querySelector("b").textContent}: ${item.querySelector("p").textContent}`));
  for (const page of pages) {
    await page.waitForFunction(() => document.querySelectorAll("#messages li").length === 2);
    assert.deepEqual(await texts(page), ["Ann: Is <b>it</b> done?", "Bob: Almost"]);
  }
  await ann.waitForFunction(() => document.querySelector("#typing").textContent === "");

  // who comes later sees what was written, and the name is not the client's to choose
  await bob.evaluate(() => {
    const { token, record } = JSON.parse(localStorage.pocketbase_auth);
    return fetch("/api/notify/publish", {
      method: "POST", headers: { authorization: token, "content-type": "application/json" },
      body: JSON.stringify({ topic: "chat/everyone", data: { text: "I am Ann", name: "Ann", id: record.id } }),
    });
  });
  await setClockAhead(ann); // she is still signed in
  await ann.reload();
  await ann.waitForFunction(() => document.querySelectorAll("#messages li").length === 3);
  assert.equal((await texts(ann)).at(-1), "Bob: I am Ann");
  await ann.click("#sign-out");
  await ann.waitForSelector("#sign-in:not([hidden])");
  await bob.waitForFunction(() => document.querySelectorAll("#members li").length === 1);

  demo.kill();
  await ended;
  assert.deepEqual(await readdir(temporary).then((names) => names.filter((name) => name.startsWith("herald-demo"))), []);
});

test("a job's progress", async (t) => {
  const herald = await Herald.install(t);
  await cp(join(root, "examples/jobs/pb_hooks"), join(herald.folder, "pb_hooks"), { recursive: true });
  await cp(join(root, "examples/jobs/pb_public"), join(herald.folder, "pb_public"), { recursive: true });
  await herald.start();
  const superuser = await herald.superuser();
  await addUser(superuser, "ann@example.com");
  await addUser(superuser, "bob@example.com");
  const browser = await launchBrowser(t);
  const enter = async (email) => {
    const page = await openPage(t, browser, herald.url);
    await signIn(page, email);
    await page.waitForSelector("#export:not([hidden])");
    return page;
  };
  const [ann, annAgain, bob] = [await enter("ann@example.com"), await enter("ann@example.com"), await enter("bob@example.com")];
  await ann.click("#export");
  await ann.waitForFunction(() => document.querySelector("#status").textContent === "60 %");
  await ann.waitForFunction(() => document.querySelector("#status").textContent === "Done: 1234 rows");
  await annAgain.waitForFunction(() => document.querySelector("#progress").value === 100);
  assert.equal(await bob.textContent("#status"), "");
  await setClockAhead(ann); // she is still signed in
  await ann.reload();
  await ann.waitForSelector("#export:not([hidden])");
});

test("the npm package in a Vite build", async (t) => {
  const folder = await mkdtemp(join(tmpdir(), "herald-vite-"));
  t.after(() => rm(folder, { recursive: true, force: true }));
  const { stdout } = await run("npm", ["pack", "./clients/js", "--json", "--pack-destination", folder], { cwd: root });
  const [packed] = JSON.parse(stdout);
  assert.deepEqual(packed.files.map(({ path }) => path).sort(), ["LICENSE", "README.md", "herald.d.ts", "herald.js", "package.json"]);
  t.diagnostic(`${packed.filename}: ${packed.size} bytes packed`);

  // installed as npm does it: unpacked beside the SDK
  const installed = join(folder, "node_modules/herald-pocketbase");
  await mkdir(installed, { recursive: true });
  await run("tar", ["-xzf", join(folder, packed.filename), "-C", installed, "--strip-components=1"]);
  await cp(join(root, "node_modules/pocketbase"), join(folder, "node_modules/pocketbase"), { recursive: true });
  await writeFile(join(folder, "package.json"), '{"type": "module"}');
  await writeFile(join(folder, "index.html"), '<link rel="icon" href="data:,"><p></p><script type="module" src="/main.js"></script>');
  await writeFile(join(folder, "main.js"), `
    import PocketBase from "pocketbase";
    import { subscribe } from "herald-pocketbase";
    const pb = new PocketBase(location.origin);
    await subscribe(pb, "example", ({ data }) => (document.querySelector("p").textContent += data));
    document.querySelector("p").id = "ready";
  `);
  await writeFile(join(folder, "unused.js"), 'import "herald-pocketbase"; console.log("nothing of it is needed");');
  await build({ root: folder, logLevel: "warn", build: { target: "es2022" } });
  const [bundle] = (await readdir(join(folder, "dist/assets"))).filter((name) => name.endsWith(".js"));
  assert.ok((await readFile(join(folder, "dist/assets", bundle), "utf8")).length > 10_000);

  // what is not used is left out
  const [{ output }] = [await build({ root: folder, logLevel: "warn", build: { write: false, lib: { entry: "unused.js", formats: ["es"], fileName: "unused" } } })].flat();
  assert.ok(output[0].code.length < 200, output[0].code.slice(0, 500));

  const herald = await Herald.install(t);
  await cp(join(folder, "dist"), join(herald.folder, "pb_public"), { recursive: true });
  await herald.start();
  const superuser = await herald.superuser();
  const page = await openPage(t, await launchBrowser(t), herald.url);
  await page.waitForSelector("#ready", { state: "attached" });
  await send(superuser, { topic: "example", data: "Hello" });
  await page.waitForFunction(() => document.querySelector("p").textContent === "Hello");
});
