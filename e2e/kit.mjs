// The kit of the end-to-end tests: the built executable in a folder of its own,
// the stock JavaScript SDK, and Chromium.

import { execFile, spawn } from "node:child_process";
import { rmSync } from "node:fs";
import { cp, mkdir, mkdtemp, readdir, readFile, rm, stat, writeFile } from "node:fs/promises";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { promisify } from "node:util";

import { EventSource } from "eventsource";
import PocketBase from "pocketbase";

globalThis.EventSource = EventSource; // Node has none

const run = promisify(execFile);

export const root = join(import.meta.dirname, "..");
export const password = "1234567890";
const rootEmail = "root@example.com";

/** How long to wait for what has to come; it matters where a test fails only. */
const patience = 60_000;

export async function until(what, condition) {
  const deadline = Date.now() + patience;
  for (;;) {
    const result = await condition();
    if (result) return result;
    if (Date.now() > deadline) throw new Error(`timed out: ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
}

/** Says now and then where a test is that takes long: the runner says nothing of a file that it cuts off. Returns what notes
 * the place, which is a text or makes one. */
export function whereabouts(t, ms = 60_000) {
  let place = "the beginning";
  const timer = setInterval(() => console.log(`${t.name}: still at ${typeof place === "function" ? place() : place}`), ms);
  timer.unref();
  t.after(() => clearInterval(timer));
  return (next) => (place = next);
}

const ports = join(tmpdir(), "herald-test-ports"); // a file for each that is taken
const takenPorts = [];
process.on("exit", () => takenPorts.forEach((path) => rmSync(path, { force: true })));

/** A port that no other test gets, in this process or another one. The system gives none of that range to outgoing
 * connections: one of those could take the port while its server restarts, or a client be connected to itself. */
export async function freePort() {
  for (;;) {
    const port = 11_000 + Math.floor(Math.random() * 20_000); // browsers refuse some below
    const path = join(ports, String(port));
    await mkdir(ports, { recursive: true });
    const { mtimeMs } = await stat(path).catch(() => ({}));
    if (mtimeMs < Date.now() - 3_600_000) await rm(path, { force: true }); // of a process that was killed
    const isTaken = await writeFile(path, "", { flag: "wx" }).then(() => false, () => true);
    if (isTaken) continue;
    takenPorts.push(path);
    const server = createServer();
    const isFree = await new Promise((resolve) => server.once("error", () => resolve(false)).listen(port, "127.0.0.1", () => resolve(true)));
    if (!isFree) continue;
    await new Promise((resolve) => server.close(resolve));
    return port;
  }
}

/** The executable, installed alone in a folder as an operator would. */
export class Herald {
  static async install(t, executable = join(root, "bin/herald")) {
    const herald = new Herald();
    herald.folder = await mkdtemp(join(tmpdir(), "herald-"));
    herald.executable = join(herald.folder, "herald");
    await cp(executable, herald.executable);
    // An executable below the system's temporary folder takes itself for one
    // that was started by "go run": let that folder be another one.
    await mkdir(join(herald.folder, "tmp"));
    herald.env = { ...process.env, TMPDIR: join(herald.folder, "tmp") };
    herald.port = await freePort();
    herald.url = `http://127.0.0.1:${herald.port}`;
    herald.clients = [];
    herald.edges = [];
    t.after(async () => {
      // first: an SDK client that lost its server tries for ever, and Node would not end
      for (const client of herald.clients) {
        client.cancelAllRequests(); // one may never be answered
        await client.realtime.unsubscribe().catch(() => {});
        client.realtime.disconnect(); // which unsubscribe leaves out while it is connecting again
      }
      for (const edge of herald.edges) await edge.stop("SIGKILL");
      await herald.stop();
      await rm(herald.folder, { recursive: true, force: true, maxRetries: 3 });
    });
    return herald;
  }

  /** Runs the executable with arguments and returns what it prints. */
  async command(...args) {
    const { stdout } = await run(this.executable, args, { cwd: this.folder, env: this.env });
    return stdout;
  }

  start(...args) {
    return this.launch("serve", ...args);
  }

  /** Starts the server as the origin of edges. */
  async startOrigin() {
    this.nats ??= `127.0.0.1:${await freePort()}`;
    return this.start(`--notifyNATS=embedded://${this.nats}`);
  }

  /** Starts the server, and an edge in front of it, which the clients use in its place. */
  async startBehindEdge(...args) {
    const nats = `127.0.0.1:${await freePort()}`;
    this.origin = Object.assign(new Herald(), { folder: this.folder, executable: this.executable, env: this.env, port: await freePort() });
    this.origin.url = `http://127.0.0.1:${this.origin.port}`;
    await this.origin.launch("serve", `--notifyNATS=embedded://${nats}`, ...args);
    return this.launch("edge", `--nats=nats://${nats}`, `--origin=${this.origin.url}`, "--name=edge");
  }

  /** Starts an edge. It is used like the server, and has the same data behind it. */
  async edge(name) {
    const edge = Object.assign(new Herald(), { folder: this.folder, executable: this.executable, env: this.env, clients: this.clients });
    edge.port = await freePort();
    edge.url = `http://127.0.0.1:${edge.port}`;
    edge.start = () => edge.launch("edge", `--nats=nats://${this.nats}`, `--origin=${this.url}`, `--name=${name}`);
    this.edges.push(edge);
    return edge.start();
  }

  async launch(command, ...args) {
    this.output = "";
    const limit = this.maxFiles ? `ulimit -n ${this.maxFiles};` : "";
    this.process = spawn("sh", ["-c", `${limit} exec "$0" "$@"`, this.executable, command, `--http=127.0.0.1:${this.port}`, ...args],
      { cwd: this.folder, env: this.env });
    this.exited = new Promise((resolve) => this.process.on("exit", resolve));
    for (const stream of [this.process.stdout, this.process.stderr]) stream.on("data", (text) => (this.output += text));
    let ended = false;
    this.exited.then(() => (ended = true));
    await until("the server answers", async () => {
      if (ended) throw new Error(`the server ended:\n${this.output}`);
      return fetch(`${this.url}/api/health`).then((response) => response.ok, () => false);
    });
    return this;
  }

  async stop(signal = "SIGTERM") {
    if (!this.process) return;
    this.process.kill(signal);
    await this.exited;
    this.process = undefined;
    await this.origin?.stop(signal);
  }

  /** Removes the history, as a lost disk would. */
  async loseHistory() {
    for (const suffix of ["", "-wal", "-shm"]) await rm(join(this.folder, "pb_data", `notify_history.db${suffix}`), { force: true });
  }

  /** A new SDK client, as another tab or device. */
  client(url = this.url, SDK = PocketBase) {
    const client = new SDK(url);
    this.clients.push(client);
    return client;
  }

  /** Makes the superuser and returns a client that is signed in as them. */
  async superuser() {
    await this.command("superuser", "upsert", rootEmail, password);
    const client = this.client();
    await client.collection("_superusers").authWithPassword(rootEmail, password);
    client.email = rootEmail;
    return client;
  }

  async signIn(email) {
    const client = this.client();
    await client.collection("users").authWithPassword(email, password);
    return client;
  }
}

/** Adds a user with the superuser's client. */
export function addUser(superuser, email, values = {}) {
  return superuser.collection("users").create({ email, password, passwordConfirm: password, ...values });
}

/** Sends a message with the superuser's client and returns the report. */
export function send(superuser, message) {
  return superuser.send("/api/notify", { method: "POST", body: message, requestKey: null });
}

/** What a client receives on a topic. */
export class Received {
  #items = [];
  #look = () => {};

  static async on(client, topic, options) {
    const received = new Received();
    await client.realtime.subscribe(topic, (data) => {
      received.#items.push(data);
      received.#look();
    }, options);
    return received;
  }

  /** The next data, waited for. */
  async next() {
    const timer = setTimeout(() => this.#look(new Error("no message came")), patience);
    try {
      while (this.#items.length === 0) {
        const error = await new Promise((resolve) => (this.#look = resolve));
        if (error) throw error;
      }
      return this.#items.shift();
    } finally {
      clearTimeout(timer);
    }
  }

  get waiting() {
    return this.#items.length;
  }
}

/** Makes a page's clock be ahead from its next loading on, by longer than a token lasts or by some milliseconds. */
export async function setClockAhead(page, ahead = 90 * 86_400_000) {
  await page.addInitScript((ahead) => {
    const { Date } = globalThis;
    const now = () => Date.now() + ahead;
    globalThis.Date = class extends Date {
      constructor(...of) {
        super(...(of.length > 0 ? of : [now()]));
      }
      static now = now;
    };
  }, ahead);
}

/** Chromium, or what the environment variable CHROMIUM names. */
export async function launchBrowser(t) {
  const { chromium } = await import("playwright-core");
  const server = await chromium.launchServer({
    executablePath: process.env.CHROMIUM || "/usr/bin/chromium",
    args: ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
      "--disable-component-update", "--disable-sync"],
  });
  t.after(() => server.close());
  const browser = await chromium.connect(server.wsEndpoint());
  t.after(() => browser.close());
  return Object.assign(browser, { signal: (name) => signalAll(server.process().pid, name) });
}

/** Sends a signal to a process and all that it has started: SIGSTOP is a laptop that is closed. */
async function signalAll(pid, name) {
  const parents = new Map();
  for (const entry of await readdir("/proc")) {
    const stat = /^\d+$/.test(entry) && (await readFile(`/proc/${entry}/stat`, "utf8").catch(() => ""));
    if (stat) parents.set(Number(entry), Number(stat.slice(stat.lastIndexOf(")") + 2).split(" ")[1]));
  }
  const isBelow = (id) => id === pid || (parents.has(id) && isBelow(parents.get(id)));
  for (const id of [...parents.keys()].filter(isBelow)) {
    try {
      process.kill(id, name);
    } catch (error) {
      if (id === pid || error.code !== "ESRCH") throw error; // one that has ended since, as when the signal woke its parent
    }
  }
}
