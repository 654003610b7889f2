// The command line, as the built executable: piped, and on a pseudo-terminal.

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { mkdtemp, stat, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { after, test } from "node:test";

import { addUser, Herald, Received, send, until } from "./kit.mjs";
import { RudeProxy } from "./proxy.mjs";

const children = [];
after(() => children.forEach((child) => child.kill("SIGKILL"))); // those that watch, where a test fails

/** Runs "herald notify …" and returns its exit code and what it prints. */
function run(herald, args, { input = "", env = {} } = {}) {
  const child = spawn(herald.executable, ["notify", ...args], { cwd: herald.folder, env: { ...herald.env, HERALD_URL: herald.url, ...env } });
  const result = { out: "", err: "", child };
  children.push(child);
  child.stdout.on("data", (text) => (result.out += text));
  child.stderr.on("data", (text) => (result.err += text));
  child.stdin.on("error", () => {}); // EPIPE: some have ended by now and read nothing
  child.stdin.end(input);
  result.done = new Promise((resolve) => child.on("close", (code) => resolve(Object.assign(result, { code }))));
  return result;
}

test("herald notify", async (t) => {
  const herald = await (await Herald.install(t)).start();
  const ok = async (...args) => {
    const { code, out, err } = await run(herald, args).done;
    assert.deepEqual([code, err], [0, ""], args.join(" "));
    return out;
  };
  const fails = async (code, pattern, args, options) => {
    const result = await run(herald, args, options).done;
    assert.equal(result.code, code, `${args}: ${result.out}${result.err}`);
    assert.match(result.err, pattern);
    assert.equal(result.out, "");
  };

  await fails(1, /there is no data directory here.*elsewhere/, ["topics", "--dir", join(herald.folder, "elsewhere")]);
  await fails(1, /there is no superuser/, ["topics", "--dir", await mkdtemp(join(herald.folder, "empty-"))]);
  const root = await herald.superuser();
  const ann = await addUser(root, "ann@example.com", { name: "Ann" });
  await root.collection("notify_channels").create({ pattern: "log", subscribeRule: "*", history: 100 });
  const guest = await Received.on(herald.client(), "example");
  const anns = await herald.signIn("ann@example.com");
  const toAnn = await Received.on(anns, "example");

  await t.test("send", async () => {
    const report = JSON.parse(await ok("send", "example", '{"text": "Hello"}'));
    assert.deepEqual({ ...report, id: "" }, { id: "", topic: "example", matched: 2, queued: 2, dropped: 0 });
    assert.deepEqual([await guest.next(), await toAnn.next()], [{ text: "Hello" }, { text: "Hello" }]);
    await ok("send", "example", '"for Ann"', "--user", `users:${ann.id}`);
    await ok("send", "example", '"not for Ann"', "--except", `users:${ann.id}`);
    await ok("send", "example", '"for users"', "--auth", "user", "--filter", "name = 'Ann'");
    await writeFile(join(herald.folder, "data.json"), '{"from": "a file"}');
    await ok("send", "example", "@data.json", "--id", "m1");
    assert.equal(JSON.parse(await ok("send", "example", "@data.json", "--id", "m1")).id, "m1");
    assert.equal((await run(herald, ["send", "example"], { input: '{"from": "stdin"}' }).done).code, 0);
    assert.equal((await run(herald, ["send", "example", "-"], { input: "42" }).done).code, 0);
    assert.equal((await run(herald, ["send", "example", '{"a": 1, "a": "hi \\ud83d"}']).done).code, 0); // as the API takes it
    const want = [{ from: "a file" }, { from: "stdin" }, 42, { a: "hi \ufffd" }];
    for (const data of ["not for Ann", ...want]) assert.deepEqual(await guest.next(), data);
    for (const data of ["for Ann", "for users", ...want]) assert.deepEqual(await toAnn.next(), data);

    await fails(2, /is not JSON; a text needs its own quotes/, ["send", "example", "Hello"]);
    await fails(2, /no-such-file/, ["send", "example", "@no-such-file"]);
    await fails(2, /accepts between 1 and 2 arg/, ["send"]);
    await fails(2, /unknown flag/, ["send", "example", "1", "--nope"]);
    await fails(2, /there is no command "sned"/, ["sned", "example", "1"]);
    for (const topic of ["", "we?x"]) await fails(2, /a topic must not be empty/, ["tail", "example", topic]);
    await fails(1, /topic: .*reserved/, ["send", "@inbox", "1"]);
    await fails(1, /to\.filter: .*nope/, ["send", "example", "1", "--filter", "nope = 1"]);
    for (const flag of ["--filter", "--auth", "--user", "--except"]) await fails(2, new RegExp(`${flag} is empty`), ["send", "example", "1", flag, ""]); // a variable that is not set
  });

  await t.test("which server, and as whom", async () => {
    await fails(3, /no server answers/, ["topics", "--url", "http://127.0.0.1:1"]);
    await fails(2, /is not an address/, ["topics", "--url", "nonsense"]);
    await fails(2, /give --token or HERALD_TOKEN/, ["topics", "--url", "http://herald.example"]);
    await fails(1, /authorization token/, ["topics", "--token", "wrong"]);
    for (const flag of ["--token", "--url"]) await fails(2, new RegExp(`${flag} is empty`), ["topics", flag, ""]);
    await fails(1, /allowed|authorized/i, ["topics"], { env: { HERALD_TOKEN: anns.authStore.token } });
    await ok("topics", "--token", root.authStore.token, "--url", herald.url.replace("127.0.0.1", "localhost") + "/");
  });

  await t.test("with a token nothing local is touched", async () => {
    const dir = join(herald.folder, "not-there", "pb_data");
    await ok("topics", "--token", root.authStore.token, "--dir", dir);
    assert.match((await run(herald, ["send", "example", '"remote"', "--dir", dir], { env: { HERALD_TOKEN: root.authStore.token } }).done).out, /matched/);
    await fails(3, /no server answers/, ["topics", "--dir", dir, "--token", "t", "--url", "http://127.0.0.1:1"]);
    await fails(2, /accepts between 1 and 2 arg/, ["send", "--dir", dir]);
    await fails(1, /there is no data directory here/, ["topics", "--dir", dir]);
    await assert.rejects(stat(join(dir, "..")), { code: "ENOENT" });
    assert.equal(await guest.next(), "remote");
    assert.equal(await toAnn.next(), "remote");
  });

  await t.test("topics, clients, kick", async () => {
    assert.match(await ok("topics"), /^TOPIC +SUBSCRIBERS +USERS\nexample +2 +1\n$/);
    assert.deepEqual(JSON.parse(await ok("topics", "--json")), [{ topic: "example", subscribers: 2, users: 1 }]);
    assert.match(await ok("clients"), new RegExp(`^CLIENT .*\n(.*\n)*${anns.realtime.clientId} +users:${ann.id} +Ann +127\\.0\\.0\\.1 .* example\n`));
    assert.equal(JSON.parse(await ok("clients", "--json")).length, 2);
    assert.equal(JSON.parse(await ok("clients", "--json", "--user", `users:${ann.id}`)).length, 1);
    assert.deepEqual(JSON.parse(await ok("clients", "--json", "--topic", "nothing")), []);
    await fails(2, /either a client's id or --user/, ["kick"]);
    await fails(1, /no realtime client/, ["kick", "nobody"]);
    const { clientId } = anns.realtime;
    assert.equal(await ok("kick", clientId), "disconnected 1\n");
    await until("the SDK comes back", () => anns.realtime.clientId && anns.realtime.clientId !== clientId);
    await until("as Ann", async () => JSON.parse(await ok("clients", "--json", "--user", `users:${ann.id}`)).length === 1);
    assert.equal(await ok("kick", "--user", `users:${ann.id}`), "disconnected 1\n");
  });

  await t.test("tail", async () => {
    const follow = (...args) => {
      const result = run(herald, ["tail", ...args]);
      result.lines = (count) => until(`${count} lines of ${result.out}${result.err}`, () => result.out.split("\n").length > count).then(() => result.out.trim().split("\n"));
      return result;
    };
    const listens = (topic, count) => until("it listens", async () =>
      (await root.send("/api/notify/topics", {})).items.some((item) => item.topic === topic && item.subscribers === count));
    for (const n of [1, 2, 3]) await send(root, { topic: "log", data: { n } });
    const all = follow("log", "plain");
    const last = follow("log", "--rewind", "2");
    await listens("log", 2);
    await send(root, { topic: "log", data: { n: 4 } });
    await send(root, { topic: "plain", data: "text" });
    const [first, second] = (await all.lines(2)).map((line) => JSON.parse(line)).sort((a, b) => b.seq - a.seq);
    assert.deepEqual([first.topic, first.seq, first.data, second.topic, second.data], ["log", 4, { n: 4 }, "plain", "text"]);
    assert.deepEqual((await last.lines(3)).map((line) => JSON.parse(line).data.n), [2, 3, 4]);
    const since = follow("log", "--since", `${first.epoch}:3`);
    assert.deepEqual((await since.lines(1)).map((line) => JSON.parse(line).data.n), [4]);

    // it connects again by itself, and misses nothing
    await herald.stop();
    await herald.start("--notifyHeartbeat=1s");
    for (const n of [5, 6]) await send(root, { topic: "log", data: { n } });
    assert.deepEqual((await last.lines(5)).map((line) => JSON.parse(line).data.n), [2, 3, 4, 5, 6]);
    assert.match(last.err, /reconnecting/);
    await listens("log", 3);

    // nor does it behind a proxy: that forwards nothing more, and answers in the server's place
    const proxy = await RudeProxy.to(new URL(herald.url).port);
    t.after(() => proxy.close());
    const behind = follow("log", "--url", proxy.url);
    await listens("log", 4);
    proxy.hangStreams();
    const fates = ["html", 403, "cut", "pass"];
    proxy.fate = () => fates.length > 1 ? fates.shift() : "pass";
    await send(root, { topic: "log", data: { n: 7 } });
    assert.deepEqual((await behind.lines(1)).map((line) => JSON.parse(line).data.n), [7]);
    assert.match(behind.err, /nothing arrives any more/);
    assert.deepEqual(fates, ["pass"]);
    for (const tail of [all, last, since]) await tail.lines(1);

    for (const tail of [all, last, since, behind]) { // Ctrl-C
      tail.child.kill("SIGINT");
      assert.equal((await tail.done).code, 0);
    }
    await fails(2, /since/, ["tail", "log", "--since", "nonsense"]);
    await fails(2, /rewind/, ["tail", "log", "--rewind", "soon"]);
    await fails(2, /requires at least 1 arg/, ["tail"]);
    await fails(3, /no server answers/, ["tail", "log", "--url", "http://127.0.0.1:1"]);

    // for people, in colour on a terminal only; and nothing in it steers that
    await send(root, { topic: "log", data: "\u009b31m" });
    const piped = follow("log", "--rewind", "1", "--pretty");
    const [line] = await piped.lines(1);
    assert.match(line, /^\d\d:\d\d:\d\d\.\d{3} log #8 ".*31m"$/);
    assert.ok(!/[\u0080-\u009f]|\u001b/.test(line));
    piped.child.kill("SIGINT");
    await piped.done;
    const terminal = spawn("script", ["-qec", `'${herald.executable}' notify tail log --rewind 1 --pretty`, "/dev/null"],
      { cwd: herald.folder, env: { ...herald.env, HERALD_URL: herald.url, TERM: "xterm" } });
    let shown = "";
    terminal.stdout.on("data", (text) => (shown += text));
    await until("it is shown in colour", () => /\u001b\[36mlog/.test(shown));
    terminal.kill();
  });

  await t.test("bench", async () => {
    const report = JSON.parse(await ok("bench", "--clients", "20", "--messages", "30", "--json"));
    assert.deepEqual([report.clients, report.messages, report.lost], [20, 30, 0]);
    assert.ok(report.p50 > 0 && report.p50 <= report.p99 && report.deliveriesPerSecond > 0);
    assert.match(await ok("bench", "--clients", "2", "--messages", "3"), /^2 clients connected in .*\n.*latency p50 .*\n.*deliveries per second\nlost: 0 of 12\n$/);
    await fails(2, /must be at least 1/, ["bench", "--clients", "0"]);
    await fails(3, /no server answers/, ["bench", "--url", "http://127.0.0.1:1"]);
  });

  await t.test("completion", async () => {
    assert.match(await herald.command("completion", "bash"), /__start_/);
    assert.match(await herald.command("__complete", "notify", ""), /^send\t.*\ntail\t|kick\t/m);
    assert.match(await herald.command("__complete", "notify", "send", "x", "--auth", ""), /^superuser$/m);
  });
});
