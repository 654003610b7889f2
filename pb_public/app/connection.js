// The realtime connection: which topics the page is subscribed to, and whether
// the connection is up.

import { byId } from "./dom.js";

export class Connection {
  #pb;
  #handlers = new Map(); // by subscription name: {topic, options, callback}
  /** Called when the connection is back after it was lost. */
  onReconnect = () => {};

  #turn = Promise.resolve(); // calls of the SDK, one after another

  constructor(pb) {
    this.#pb = pb;
    // called when the connection is lost, and also when nothing is subscribed
    // any more
    pb.realtime.onDisconnect = () => this.#show("reconnecting");
  }

  /** Opens the connection, and opens it again after who is signed in changed:
   * the server lets a connection change from a guest to a user only. */
  open() {
    this.#show("connecting");
    return this.#inTurn(async () => {
      await this.#pb.realtime.unsubscribe();
      let lost = false;
      await this.#pb.realtime.subscribe("PB_CONNECT", () => {
        this.#show("connected");
        if (lost) this.onReconnect();
        lost = true; // the next time it is
      });
      for (const handler of this.#handlers.values()) await this.#subscribe(handler);
    });
  }

  /** Calls callback with the data of each message. One subscription a name. */
  subscribe(name, topic, options, callback) {
    const handler = { topic, options, callback };
    this.#handlers.set(name, handler);
    return this.#inTurn(async () => {
      try {
        await this.#subscribe(handler);
      } catch (error) {
        this.#handlers.delete(name);
        throw error;
      }
    });
  }

  unsubscribe(name) {
    const handler = this.#handlers.get(name);
    this.#handlers.delete(name);
    return this.#inTurn(() => handler?.stop?.());
  }

  /** Leaves a subscription out of the connection that open opens next. (To
   * unsubscribe after a sign-out fails: the open one is not the guest's.) */
  forget(name) {
    this.#handlers.delete(name);
  }

  has(name) {
    return this.#handlers.has(name);
  }

  async #subscribe(handler) {
    handler.stop = await this.#pb.realtime.subscribe(handler.topic, handler.callback, handler.options);
  }

  #inTurn(action) {
    const result = this.#turn.then(action);
    this.#turn = result.catch(() => {});
    return result;
  }

  #show(state) {
    const pill = byId("state");
    pill.dataset.state = state;
    pill.textContent = state;
    byId("client-id").textContent = (state === "connected" && this.#pb.realtime.clientId) || "none";
  }
}
