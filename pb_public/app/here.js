// Who else is subscribed, on topics whose channel has presence, and who is typing.

import { presence } from "../herald.js";
import { byId, element, setText } from "./dom.js";

const typingFor = 3000; // ms after the last key

export class Here {
  #pb;
  #topics = new Map(); // to what presence returned; null: there is none, or it may not be seen
  #typing = new Map(); // topics to the timers that end it

  /** pb is an SDK client that is there for herald.js. */
  constructor(pb) {
    this.#pb = pb;
    pb.authStore.onChange(() => {
      for (const [topic, members] of this.#topics) {
        if (!members) this.watch(topic).then((isShown) => isShown && setText(byId("subscribe-error"), ""));
      }
    });
    byId("send-form").addEventListener("input", ({ target, currentTarget }) => {
      if (target.name === "data") this.#type(currentTarget.elements.topic.value);
    });
    byId("send-form").addEventListener("submit", ({ currentTarget }) => this.#stop(currentTarget.elements.topic.value));
  }

  /** False: there is nothing to see for whoever is signed in; it is tried again when that changes. */
  async watch(topic) {
    if (this.#topics.get(topic)) return true;
    this.#topics.set(topic, null);
    const show = () => this.#show();
    const members = await presence(this.#pb, topic, { join: false, onChange: show, onCount: show }).catch(() => null);
    if (!members) return false;
    if (!this.#topics.has(topic) || this.#topics.get(topic)) {
      members.leave(); // unsubscribed meanwhile, or twice
      return true;
    }
    this.#topics.set(topic, members);
    this.#show();
    return true;
  }

  unwatch(topic) {
    this.#stop(topic);
    this.#topics.get(topic)?.leave();
    this.#topics.delete(topic);
    this.#show();
  }

  #type(topic) {
    const members = this.#topics.get(topic);
    if (!members || !this.#pb.authStore.record) return;
    if (!this.#typing.has(topic)) members.set({ typing: true }).catch(() => {}); // without a right to be shown it is not
    clearTimeout(this.#typing.get(topic));
    this.#typing.set(topic, setTimeout(() => this.#stop(topic), typingFor));
  }

  #stop(topic) {
    if (!this.#typing.has(topic)) return;
    clearTimeout(this.#typing.get(topic));
    this.#typing.delete(topic);
    this.#topics.get(topic)?.set(null).catch(() => {});
  }

  #show() {
    const lines = [...this.#topics].filter(([, members]) => members?.total + members?.guests > 0).map(([topic, members]) => {
      const people = [...members.values()].map(({ user, fields, meta }) =>
        element("span", { className: meta?.typing ? "person typing" : "person", title: user }, String(fields.name || fields.email || user)));
      const rest = members.total - people.length;
      if (rest > 0) people.push(element("span", { className: "muted" }, `${people.length ? "and " : ""}${rest} ${rest === 1 ? "user" : "users"}`));
      if (members.guests > 0) people.push(element("span", { className: "muted" }, members.guests === 1 ? "1 guest" : `${members.guests} guests`));
      return element("li", {}, element("span", { className: "topic" }, topic), ...people);
    });
    byId("here").replaceChildren(...lines);
    byId("here").hidden = lines.length === 0;
  }
}
