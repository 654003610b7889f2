// nginx and Caddy with the configurations that the documentation shows, as they are written there.

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { accessSync, constants, readFileSync } from "node:fs";
import { chmod, mkdtemp, rm, writeFile } from "node:fs/promises";
import { get } from "node:http";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";

import { subscribe } from "../clients/js/herald.js";
import { freePort, Herald, Received, root, send, until } from "./kit.mjs";

/** The configuration of a language in a page, with other addresses in place of those that the page shows. */
function snippet(page, language, addresses) {
  const [, code] = readFileSync(join(root, page), "utf8").match(new RegExp(`^\`\`\`${language}\\n(.*?)^\`\`\``, "ms"));
  for (const shown of Object.keys(addresses)) assert.ok(code.includes(shown), `${page} does not show ${shown}`);
  return Object.entries(addresses).reduce((text, [shown, actual]) => text.replaceAll(shown, actual), code);
}

/** A server of nginx around what stands within one. */
const nginxServer = (port, locations) => `server { listen 127.0.0.1:${port}; ${locations} }`;

/** What nginx needs around its servers, to run beside the system's own. */
const nginxMain = (servers) => `
daemon off;
pid nginx.pid;
error_log stderr warn;
events {}
http {
  access_log off;
  ${["client_body", "proxy", "fastcgi", "uwsgi", "scgi"].map((name) => `${name}_temp_path ${name};`).join(" ")}
  ${servers}
}`;

const proxies = {
  nginx: {
    executable: "nginx",
    args: (file, folder) => ["-p", folder, "-c", file],
    config: nginxMain,
  },
  caddy: {
    executable: "caddy",
    args: (file) => ["run", "--config", file, "--adapter", "caddyfile"],
    config: (text) => text.replace(/^\{/, "{\n    admin off"), // its port may be taken
  },
};

const isInstalled = (name) => process.env.PATH.split(":").concat("/usr/sbin").some((folder) => {
  try {
    accessSync(join(folder, name), constants.X_OK);
    return true;
  } catch {
    return false;
  }
});

/** A test that needs a proxy. Where the tests are run for a change, it must be there. */
function proxyTest(title, name, run) {
  const skip = isInstalled(name) || process.env.CI ? false : `${name} is not installed`;
  test(`${title}: ${name}`, { skip }, (t) => run(t, proxies[name]));
}

/** Starts a proxy in a folder of its own. Returns what stops and starts it again. */
async function startProxy(t, { executable, args, config }, port, text) {
  const folder = await mkdtemp(join(tmpdir(), "herald-proxy-"));
  await chmod(folder, 0o755); // nginx that root starts works as somebody else
  const file = join(folder, "config");
  await writeFile(file, config(text));
  const env = { ...process.env, PATH: `${process.env.PATH}:/usr/sbin`, HOME: folder, XDG_DATA_HOME: folder, XDG_CONFIG_HOME: folder };
  let child, exited, output;
  const proxy = {
    url: `http://127.0.0.1:${port}`,
    async start() {
      output = "";
      child = spawn(executable, args(file, folder), { cwd: folder, env });
      exited = new Promise((resolve) => child.on("exit", () => resolve((child = undefined))));
      for (const stream of [child.stdout, child.stderr]) stream.on("data", (data) => (output += data));
      await until("the proxy answers", async () => {
        assert.ok(child, `${executable} ended:\n${output}`);
        return fetch(`${proxy.url}/api/health`).then(({ ok }) => ok, () => false);
      });
    },
    async stop() {
      child?.kill("SIGTERM");
      await exited;
    },
  };
  t.after(async () => {
    await proxy.stop();
    await rm(folder, { recursive: true, force: true, maxRetries: 3 });
  });
  await proxy.start();
  return proxy;
}

for (const name of ["nginx", "caddy"]) {
  proxyTest("a server behind a proxy", name, async (t, kind) => {
    const herald = await Herald.install(t);
    await herald.start();
    const superuser = await herald.superuser();
    await superuser.collection("notify_channels").create({ pattern: "log/{name}", subscribeRule: "*", history: 100 });
    const header = name === "nginx" ? "X-Real-IP" : "X-Forwarded-For";
    await superuser.settings.update({ trustedProxy: { headers: [header], useLeftmostIP: false } });

    const port = await freePort();
    const own = `127.0.0.1:${herald.port}`;
    const text = snippet("docs/deployment.md", name, name === "nginx" ? { "127.0.0.1:8090": own } : { "127.0.0.1:8090": own, "example.com": `http://127.0.0.1:${port}` });
    const proxy = await startProxy(t, kind, port, name === "nginx" ? nginxServer(port, text) : text);

    const stock = herald.client(proxy.url);
    const plain = await Received.on(stock, "plain");
    const log = [];
    const stop = await subscribe(herald.client(proxy.url), "log/a", ({ data }) => log.push(data));
    for (const n of [1, 2, 3]) { // each arrives while the next is not sent yet: nothing on the way collects them
      await send(superuser, { topic: "plain", data: n });
      assert.equal(await plain.next(), n);
      await send(superuser, { topic: "log/a", data: n });
      await until(`${n} arrives`, () => log.length === n);
    }

    // large requests reach the server, which refuses this one for its content
    const large = JSON.stringify({ identity: "x".repeat(20 << 20) });
    const answer = await fetch(`${proxy.url}/api/collections/users/auth-with-password`, { method: "POST", headers: { "Content-Type": "application/json" }, body: large });
    assert.equal(answer.status, 400);

    // the server sees where a client is, and when it goes
    const before = (await superuser.send("/api/notify/clients", {})).totalItems;
    const request = get(`${proxy.url}/api/realtime`, { localAddress: "127.0.0.2", headers: { "X-Real-IP": "10.0.0.1", "X-Forwarded-For": "10.0.0.1" } });
    request.on("error", () => {}); // it is destroyed
    const clients = () => superuser.send("/api/notify/clients", { requestKey: null });
    await until("the server shows its address", async () => (await clients()).items.some(({ ip }) => ip === "127.0.0.2"));
    request.destroy();
    await until("it is gone", async () => (await clients()).totalItems === before);

    // the proxy restarts: what is sent meanwhile arrives on a topic with history, once
    await proxy.stop();
    await send(superuser, { topic: "log/a", data: 4 });
    await proxy.start();
    await send(superuser, { topic: "log/a", data: 5 });
    await until("all arrive", () => log.length >= 5);
    assert.deepEqual(log, [1, 2, 3, 4, 5]);
    await stop();
  });

  proxyTest("edges behind a proxy", name, async (t, kind) => {
    const herald = await Herald.install(t);
    await herald.startOrigin();
    const superuser = await herald.superuser();
    const edges = [await herald.edge("first"), await herald.edge("second")];

    const port = await freePort();
    const text = snippet("docs/edges.md", name, {
      "127.0.0.1:8090": `127.0.0.1:${herald.port}`,
      "127.0.0.1:8091": `127.0.0.1:${edges[0].port}`,
      "127.0.0.1:8092": `127.0.0.1:${edges[1].port}`,
      [name === "nginx" ? "127.0.0.1:8080" : "127.0.0.1:8081"]: `127.0.0.1:${port}`,
    });
    const proxy = await startProxy(t, kind, port, text);

    const received = [];
    for (let i = 0; i < 6; i++) received.push(await Received.on(herald.client(proxy.url), "example"));
    const spread = async () => {
      const { items } = await superuser.send("/api/notify/clients", {});
      return ["first", "second", undefined].map((edge) => items.filter((item) => item.edge === edge).length);
    };
    const [first, second, direct] = await spread();
    assert.ok(first && second && !direct && first + second === 6, `the clients are on ${[first, second, direct]}`);
    await send(superuser, { topic: "example", data: "to all" });
    for (const r of received) assert.equal(await r.next(), "to all");

    // an edge stops: its clients come back by the other one
    await edges[0].stop();
    await until("all are on the second", async () => (await spread()).join() === "0,6,0");
    await until("all listen", async () => (await superuser.send("/api/notify/topics", {})).items.find(({ topic }) => topic === "example")?.subscribers === 6);
    await send(superuser, { topic: "example", data: "again" });
    for (const r of received) assert.equal(await r.next(), "again");
  });
}
