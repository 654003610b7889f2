// The README's tour, run as it is written.

import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { mkdir, readFile, symlink } from "node:fs/promises";
import { join } from "node:path";
import { test } from "node:test";
import { promisify } from "node:util";

import { Herald, Received, root } from "./kit.mjs";

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
