// The notifications of the signed-in user. The topic @inbox tells every tab of
// each change, so that all show the same.

import { byId, describe, element, setText } from "./dom.js";

const shown = 20;

export class Bell {
  #pb;
  #connection;
  #records = [];
  #unread = 0;

  constructor(pb, connection) {
    this.#pb = pb;
    this.#connection = connection;

    const button = byId("bell-button");
    const panel = byId("bell-panel");
    const toggle = (open) => {
      panel.hidden = !open;
      button.ariaExpanded = String(open);
    };
    button.addEventListener("click", () => toggle(panel.hidden));
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !panel.hidden) {
        toggle(false);
        button.focus();
      }
    });
    document.addEventListener("click", (event) => {
      // composedPath: a click on an entry redraws the list and so takes the
      // clicked button out of the document
      if (!event.composedPath().includes(byId("bell"))) toggle(false);
    });
    byId("bell-read-all").addEventListener("click", () => this.#readAll());

    connection.onReconnect = () => this.#load(); // for what happened meanwhile
  }

  get #notifications() {
    return this.#pb.collection("notifications");
  }

  /** The id of the signed-in user; superusers and guests have no inbox. */
  get #user() {
    const { record } = this.#pb.authStore;
    return record?.collectionName === "users" ? record.id : undefined;
  }

  /** Takes away what belongs to whoever was signed in. */
  stop() {
    this.#records = [];
    byId("bell").hidden = true;
    byId("bell-list").replaceChildren();
    this.#connection.forget("inbox");
  }

  /** Shows the bell if a user is signed in. */
  async start() {
    if (!this.#user) return;
    await this.#connection.subscribe("inbox", "@inbox", undefined, (change) => this.#apply(change));
    await this.#load();
  }

  async #load() {
    const user = this.#user;
    if (!user) return;
    try {
      const [latest, unread] = await Promise.all([
        this.#notifications.getList(1, shown, { sort: "-created", requestKey: null }),
        this.#notifications.getList(1, 1, { filter: 'read = ""', fields: "id", requestKey: null }),
      ]);
      if (user !== this.#user) return; // signed out meanwhile: this is nobody else's
      this.#records = latest.items;
      this.#unread = unread.totalItems;
      byId("bell").hidden = false;
      this.#draw();
    } catch (error) {
      // 404: the application has no inbox, and so no bell
      if (error.status !== 404) setText(byId("notice"), `Notifications: ${describe(error)}`);
    }
  }

  #apply({ action, unread, ...record }) {
    this.#unread = unread;
    const known = this.#records.find(({ id }) => id === record.id);
    if (action === "delete") {
      this.#records = this.#records.filter(({ id }) => id !== record.id);
    } else if (known) {
      Object.assign(known, record);
    } else if (action === "create") {
      this.#records.unshift({ created: new Date().toISOString(), ...record });
      this.#records.length = Math.min(this.#records.length, shown);
    }
    this.#draw();
  }

  #draw() {
    const badge = byId("bell-count");
    badge.textContent = this.#unread > 99 ? "99+" : this.#unread;
    badge.dataset.count = this.#unread;
    byId("bell-read-all").hidden = this.#unread === 0;
    byId("bell-empty").hidden = this.#records.length > 0;
    byId("bell-list").replaceChildren(...this.#records.map((record) => this.#entry(record)));
  }

  #entry(record) {
    const button = (text, action) => {
      const result = element("button", { type: "button", className: "link" }, text);
      result.addEventListener("click", () => this.#try(action));
      return result;
    };
    const actions = element("div", { className: "actions" });
    if (!record.read) actions.append(button("Mark as read", () => this.#read(record)));
    actions.append(button("Delete", () => this.#notifications.delete(record.id)));
    const created = new Date(record.created);
    return element("li", { className: record.read ? "" : "unread" },
      element("strong", {}, record.title || "(no title)"),
      element("time", { dateTime: created.toISOString() }, created.toLocaleString([], { dateStyle: "short", timeStyle: "short" })),
      element("span", {}, record.body),
      actions,
    );
  }

  // The list changes when the server tells of the change, here as in the other
  // tabs.

  #read(record) {
    return this.#notifications.update(record.id, { read: new Date() }, { requestKey: null });
  }

  #readAll() {
    return this.#try(async () => {
      const unread = await this.#notifications.getFullList({ filter: 'read = ""', fields: "id", requestKey: null });
      await Promise.all(unread.map((record) => this.#read(record)));
    });
  }

  async #try(action) {
    try {
      await action();
    } catch (error) {
      setText(byId("notice"), describe(error));
    }
  }
}
