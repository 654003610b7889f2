// Starts the chat with two users, in a folder that is gone afterwards: see "make demo".

import { spawn } from "node:child_process";
import { cp, mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";

import PocketBase from "pocketbase";

const here = import.meta.dirname;
const http = process.env.HTTP || "127.0.0.1:8090";
const url = `http://${http}`;
const password = "1234567890";

const folder = await mkdtemp(join(tmpdir(), "herald-demo-"));
let server;
let isEnding = false;
const end = async (code) => {
  if (isEnding) return;
  isEnding = true;
  if (server && server.exitCode === null) {
    const ended = new Promise((resolve) => server.once("exit", resolve));
    server.kill();
    await ended;
  }
  await rm(folder, { recursive: true, force: true });
  process.exit(code);
};
for (const signal of ["SIGINT", "SIGTERM"]) process.on(signal, () => end(0));

const herald = (...args) => spawn(join(here, "../../bin/herald"), [
  ...args, `--dir=${folder}/pb_data`, `--migrationsDir=${folder}/pb_migrations`, `--hooksDir=${folder}/pb_hooks`, `--publicDir=${here}/pb_public`,
], { stdio: ["ignore", "ignore", "inherit"] });

try {
  // what follows would go to the other server, and its users be those of somebody's application
  if (await fetch(url).catch(() => null)) throw new Error(`there is a server at ${url} already: end it, or choose another address with "make demo HTTP=127.0.0.1:8091"`);
  for (const name of ["pb_migrations", "pb_hooks"]) await cp(join(here, name), join(folder, name), { recursive: true });
  const code = await new Promise((resolve) => herald("superuser", "upsert", "root@example.com", password).once("exit", resolve));
  if (code !== 0) throw new Error("the superuser could not be created");
  server = herald("serve", `--http=${http}`);
  server.once("exit", (code) => end(code ?? 1)); // it has said why
  while (!(await fetch(`${url}/api/health`).catch(() => null))?.ok) await new Promise((resolve) => setTimeout(resolve, 50));

  const pb = new PocketBase(url);
  await pb.collection("_superusers").authWithPassword("root@example.com", password);
  for (const name of ["Ann", "Bob"]) {
    await pb.collection("users").create({ email: `${name.toLowerCase()}@example.com`, password, passwordConfirm: password, name });
  }
} catch (error) {
  console.error(error.message);
  await end(1);
}
console.log(`
  Open ${url}/ in two windows (one of them private), and sign in:

    ann@example.com   ${password}
    bob@example.com   ${password}

  Dashboard ${url}/_/  root@example.com   ${password}
  Ctrl-C ends it. Its data is gone then.
`);
