// Somebody's own PocketBase build with Herald in it: examples/custom.

import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { readFileSync } from "node:fs";
import { cp, mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";
import { promisify } from "node:util";

import { addUser, Herald, Received, root, send } from "./kit.mjs";

test("a build of one's own", async (t) => {
  const folder = await mkdtemp(join(tmpdir(), "herald-build-"));
  t.after(() => rm(folder, { recursive: true, force: true }));
  const executable = join(folder, "custom");

  // a module of its own, by the commands of docs/go.md
  const [, commands] = readFileSync(join(root, "docs/go.md"), "utf8").match(/`(go mod edit [^`]*)`/);
  assert.ok(commands.includes("=../herald "));
  await cp(join(root, "examples/custom/main.go"), join(folder, "main.go"));
  const script = `go mod init example.com/app && ${commands.replace("=../herald ", `="$HERALD" `)} && go build -o custom .`;
  await promisify(execFile)("bash", ["-c", script], { cwd: folder, env: { ...process.env, GOTOOLCHAIN: "auto", HERALD: root } });

  const custom = await Herald.install(t, executable);
  await custom.start();
  const superuser = await custom.superuser();
  const guest = custom.client();
  const signUps = await Received.on(guest, "sign-ups");
  await addUser(superuser, "ann@example.com", { name: "Ann" });
  assert.deepEqual(await signUps.next(), { name: "Ann" });

  await send(superuser, { topic: "sign-ups", data: "by HTTP" });
  assert.equal(await signUps.next(), "by HTTP");
  const report = JSON.parse(await custom.command("notify", "send", "sign-ups", '"by the command line"', "--url", custom.url));
  assert.equal(report.queued, 1);
  assert.equal(await signUps.next(), "by the command line");
});
