// The README's tour, run as it is written.

import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { mkdir, readFile, symlink } from "node:fs/promises";
import { join } from "node:path";
import { test } from "node:test";
import { promisify } from "node:util";

import { freePort, Herald, Received, root, until } from "./kit.mjs";

const run = promisify(execFile);

test("the tour of the README", async (t) => {
  const readme = await readFile(join(root, "README.md"), "utf8");
  const tour = readme.slice(readme.indexOf("## A tour"), readme.indexOf("## Recipes"));
  const blocks = [...tour.matchAll(/```sh\n(.*?)```/gs)].map((match) => match[1]);
  assert.equal(blocks.length, 3);

  const herald = await (await Herald.install(t)).start();
  await mkdir(join(herald.folder, "bin"));
  await symlink(herald.executable, join(herald.folder, "bin/herald"));
  // the data is beside the executable, not beside the link to it
  const script = blocks.join("\n").replaceAll("http://127.0.0.1:8090", herald.url)
    .replace("superuser upsert", `superuser upsert --dir=${join(herald.folder, "pb_data")}`);

  const client = herald.client();
  const received = await Received.on(client, "example");
  const { stdout } = await run("bash", ["-euc", script], { cwd: herald.folder, env: herald.env });
  assert.deepEqual(await received.next(), { text: "Hello" });
  assert.deepEqual(await received.next(), { text: "Sign up!" });
  assert.match(stdout, /"topic":"example","matched":1,"queued":1,"dropped":0\}/);
});

test("the three commands of docs/edges.md", async (t) => {
  const text = await readFile(join(root, "docs/edges.md"), "utf8");
  const commands = [...text.slice(text.indexOf("## Try it"), text.indexOf("## What happens when")).matchAll(/```sh\n(.*?)```/gs)].map((match) => match[1].trim());
  assert.equal(commands.length, 3);
  const readme = await readFile(join(root, "README.md"), "utf8");
  for (const command of commands) assert.ok(readme.includes(`${command}\n`), `the README has another command than ${command}`);

  const herald = await Herald.install(t);
  const ports = Object.fromEntries(await Promise.all(["4222", "8090", "8091", "8092"].map(async (port) => [port, await freePort()])));
  const processes = [];
  t.after(() => Promise.all(processes.map((process) => process.stop("SIGKILL"))));
  const start = async (command) => {
    const [, name, ...args] = command.replace(/:(4222|8090|8091|8092)\b/g, (_, port) => `:${ports[port]}`).split(" ");
    const process = Object.assign(new Herald(), { folder: herald.folder, executable: herald.executable, env: herald.env });
    process.port = Number(args[args.indexOf("--http") + 1].split(":").at(-1));
    process.url = `http://127.0.0.1:${process.port}`;
    processes.push(process);
    return process.launch(name, ...args);
  };
  const [origin, ...edges] = [await start(commands[0]), await start(commands[1]), await start(commands[2])];
  const clients = edges.map(({ url }) => herald.client(url));
  const connected = [0, 0];
  const received = await Promise.all(clients.map(async (client, i) => {
    await client.realtime.subscribe("PB_CONNECT", () => connected[i]++);
    return Received.on(client, "example");
  }));
  const both = async (data) => {
    await run(herald.executable, ["notify", "send", "example", JSON.stringify(data), "--url", origin.url], { cwd: herald.folder, env: herald.env });
    for (const each of received) assert.equal(await each.next(), data);
  };
  await run(herald.executable, ["superuser", "upsert", "root@example.com", "1234567890"], { cwd: herald.folder, env: herald.env });
  await both("before");
  await origin.stop();
  await start(commands[0]);
  await until("the clients are back", async () => {
    const { stdout } = await run(herald.executable, ["notify", "clients", "--json", "--url", origin.url], { cwd: herald.folder, env: herald.env });
    return JSON.parse(stdout).items?.length === 2 || JSON.parse(stdout).length === 2;
  });
  await both("after");
  assert.deepEqual(connected, [1, 1]);
});
