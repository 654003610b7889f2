// The realtime connection: which topics the page is subscribed to, which of them
// it is denied, and whether the connection is up.

import { byId } from "./dom.js";

export class Connection {
  #pb;
  #handlers = new Map(); // by subscription name: {topic, options, callback, onDenied}
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
      await this.#pb.realtime.subscribe("@denied", ({ topic }) => this.#inTurn(() => this.#deny(topic)));
      for (const handler of this.#handlers.values()) {
        try {
          await this.#subscribe(handler);
          handler.onDenied?.(false);
        } catch (error) {
          if (error.status !== 403) throw error;
        }
      }
    });
  }

  /** Calls callback with the data of each message, and onDenied when the server
   * ends the subscription (true), or gives it to whom has signed in (false). One
   * subscription a name. */
  subscribe(name, topic, options, callback, onDenied) {
    const handler = { topic, options, callback, onDenied };
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
    try {
      handler.stop = await this.#pb.realtime.subscribe(handler.topic, handler.callback, handler.options);
    } catch (error) {
      if (error.status === 403) await this.#deny(handler.topic);
      throw error;
    }
  }

  /** The SDK goes on asking for a topic that it was denied, and takes a new
   * subscription to it for one that is there already: let it forget the topic. */
  async #deny(topic) {
    await this.#pb.realtime.unsubscribe(topic);
    for (const handler of this.#handlers.values()) {
      if (handler.topic !== topic) continue;
      handler.stop = undefined;
      handler.onDenied?.(true);
    }
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
