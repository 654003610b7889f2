// A TCP proxy that does to connections what networks do: it drops, stalls and cuts
// them.

import { createServer as createHTTPServer, request as httpRequest } from "node:http";
import { connect, createServer } from "node:net";

/** Random numbers from 0 to 1, the same for the same seed (mulberry32). */
function seeded(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 4294967296;
  };
}

/** An HTTP proxy that answers in the server's place, as those do that are being deployed,
 * filter, or belong to a hotel: fate says what becomes of a request, at once or later. */
export class RudeProxy {
  #server;
  #streams = new Set(); // of /api/realtime
  #timer;
  /** "pass", "cut" (half of the answer), "html" (with 200), "hang", or a status. */
  fate = () => "pass";
  /** The path below which the server is; what is not below it is not found. */
  path = "";
  /** Requests that did not pass. */
  count = 0;
  /** Streams that were opened. */
  streams = 0;

  static async to(port) {
    const proxy = new RudeProxy();
    proxy.#server = createHTTPServer((request, response) => proxy.#handle(port, request, response));
    await new Promise((resolve) => proxy.#server.listen(0, "127.0.0.1", resolve));
    proxy.port = proxy.#server.address().port;
    proxy.url = `http://127.0.0.1:${proxy.port}`;
    return proxy;
  }

  async close() {
    clearInterval(this.#timer);
    this.#server.closeAllConnections();
    await new Promise((resolve) => this.#server.close(resolve));
  }

  /** What has come last on the stream with a client id. */
  describe(clientId) {
    const response = [...this.#streams].find((response) => response.clientId === clientId);
    return response ? JSON.stringify({ isHung: response.isHung, last: response.last }) : "no stream";
  }

  /** Ends all streams, as a restart of the server does. */
  endStreams() {
    for (const response of this.#streams) response.destroy();
  }

  /** Forwards nothing more on the streams there are, and does not end them. */
  hangStreams() {
    for (const response of this.#streams) response.isHung = true;
  }

  /** Answers at random from now on, in every way it can. */
  fail(seed) {
    const random = seeded(seed);
    this.fate = (request) => {
      if (random() < 0.75) return "pass";
      const fates = ["html", 404, 401, 403, 400, 502, "hang"];
      if (!request.url.startsWith("/api/realtime") || request.method !== "GET") fates.push("cut", "cut", "cut");
      return fates[Math.floor(random() * fates.length)];
    };
    this.#timer = setInterval(() => {
      for (const response of this.#streams) {
        if (random() < 0.03) {
          this.count++;
          response.isHung = true;
        }
      }
    }, 1000);
  }

  /** Answers as the server does again. Streams that hang go on hanging. */
  heal() {
    this.fate = () => "pass";
    clearInterval(this.#timer);
  }

  async #handle(port, request, response) {
    if (!request.url.startsWith(`${this.path}/`)) return response.writeHead(404).end();
    request.url = request.url.slice(this.path.length);
    const isStream = request.method === "GET" && request.url.startsWith("/api/realtime");
    const fate = await this.fate(request);
    if (response.destroyed) return;
    if (fate !== "pass") this.count++;
    if (fate === "hang" && !isStream) return;
    if (fate === "html" || typeof fate === "number") {
      response.writeHead(fate === "html" ? 200 : fate, { "Content-Type": fate === 403 ? "application/json" : "text/html" });
      response.end(fate === 403 ? '{"error": "blocked"}' : "<html><body>One moment, please</body></html>");
      return;
    }
    const upstream = httpRequest({ port, host: "127.0.0.1", method: request.method, path: request.url, headers: request.headers }, (answer) => {
      if (isStream) {
        this.streams++;
        this.#streams.add(response);
        response.isHung = fate === "hang";
        response.on("close", () => this.#streams.delete(response));
        response.writeHead(answer.statusCode, answer.headers);
        response.flushHeaders();
        response.last = [];
        answer.on("data", (data) => {
          response.clientId ??= /"clientId":"(\w+)"/.exec(data)?.[1];
          response.last = [...response.last.slice(-9), data.toString().slice(0, 60)];
          return response.isHung || response.write(data);
        });
        answer.on("end", () => response.isHung || response.end());
        answer.on("error", () => response.isHung || response.destroy());
        return;
      }
      const parts = [];
      answer.on("error", () => response.destroy());
      answer.on("data", (data) => parts.push(data));
      answer.on("end", () => {
        const body = Buffer.concat(parts);
        const { "transfer-encoding": _, ...headers } = answer.headers;
        if (answer.statusCode !== 204) headers["content-length"] = body.length;
        response.writeHead(answer.statusCode, headers);
        if (fate !== "cut" || body.length === 0) return response.end(body);
        response.write(body.subarray(0, body.length / 2), () => response.destroy());
      });
    });
    upstream.on("error", () => response.destroy());
    response.on("close", () => upstream.destroy());
    request.pipe(upstream);
  }
}

export class FaultyProxy {
  #pairs = new Set();
  #timers = new Set();
  #port;
  #server;
  #random = Math.random;
  #failing = false;
  #frozen = false;
  /** How many connections have failed by its fault. */
  count = 0;

  static async to(port) {
    const proxy = new FaultyProxy();
    proxy.#port = port;
    proxy.#server = createServer((client) => proxy.#accept(client));
    await new Promise((resolve) => proxy.#server.listen(0, "127.0.0.1", resolve));
    proxy.url = `http://127.0.0.1:${proxy.#server.address().port}`;
    return proxy;
  }

  async close() {
    this.heal();
    for (const pair of this.#pairs) this.#end(pair);
    await new Promise((resolve) => this.#server.close(resolve));
  }

  #accept(client) {
    if (this.#failing && this.#random() < 0.15) {
      this.count++;
      client.resetAndDestroy();
      return;
    }
    const pair = { client, server: connect(this.#port, "127.0.0.1") };
    this.#pairs.add(pair);
    for (const [from, to] of [[client, pair.server], [pair.server, client]]) {
      from.on("data", (data) => {
        if (!to.write(data)) from.pause();
      });
      to.on("drain", () => pair.stalled || from.resume());
      from.on("end", () => to.end());
      from.on("error", () => this.#end(pair));
      from.on("close", () => this.#end(pair));
    }
    if (this.#frozen) this.#stall(pair);
    if (this.#failing) this.#plan(pair);
  }

  #end(pair) {
    this.#pairs.delete(pair);
    pair.client.destroy();
    pair.server.destroy();
  }

  #stall(pair) {
    pair.stalled = true;
    pair.client.pause();
    pair.server.pause();
  }

  #resume(pair) {
    pair.stalled = false;
    pair.client.resume();
    pair.server.resume();
  }

  #later(ms, f) {
    const timer = setTimeout(() => {
      this.#timers.delete(timer);
      f();
    }, ms);
    this.#timers.add(timer);
  }

  /** Decides what becomes of a connection, and when. */
  #plan(pair) {
    this.#later(200 + this.#random() * 8000, () => {
      if (!this.#pairs.has(pair)) return;
      this.count++;
      const fate = this.#random();
      if (fate < 0.35) { // cut
        pair.client.resetAndDestroy();
        this.#end(pair);
      } else if (fate < 0.55) { // closed, as by a proxy that restarts
        pair.client.end();
        pair.server.end();
      } else { // stalls, and goes on or is dropped
        this.#stall(pair);
        this.#later(this.#random() * 4000, () => {
          if (fate < 0.75) this.#resume(pair);
          else this.#end(pair);
          if (this.#pairs.has(pair)) this.#plan(pair);
        });
      }
    });
  }

  /** Lets connections fail from now on; the same seed gives the same faults, as far
   * as the connections come in the same order. */
  fail(seed) {
    this.#random = seeded(seed);
    this.#failing = true;
    for (const pair of this.#pairs) this.#plan(pair);
  }

  /** Ends all faults. Connections that stall are dropped. */
  heal() {
    this.#failing = false;
    for (const timer of this.#timers) clearTimeout(timer);
    this.#timers.clear();
    for (const pair of this.#pairs) if (pair.stalled) this.#end(pair);
  }

  /** Nothing passes any more, and nobody is told. */
  freeze() {
    this.#frozen = true;
    for (const pair of this.#pairs) this.#stall(pair);
  }

  /** New connections pass again; old: the stalled ones too. */
  thaw({ old }) {
    this.#frozen = false;
    if (old) for (const pair of this.#pairs) this.#resume(pair);
  }
}
