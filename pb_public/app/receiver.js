// Subscriptions and the messages that come.

import { byId, describe, element, setText, timeOf } from "./dom.js";

const maxShown = 200;

export function bindReceiver(connection) {
  const form = byId("subscribe-form");
  const error = byId("subscribe-error");
  const log = byId("messages");

  const count = () => {
    byId("message-count").textContent = log.childElementCount || "";
    byId("messages-empty").hidden = log.childElementCount > 0;
    byId("clear").hidden = log.childElementCount === 0;
  };

  const add = (name, data) => {
    const now = new Date();
    const compact = JSON.stringify(data);
    log.prepend(element("li", {},
      element("time", { dateTime: now.toISOString() }, timeOf(now)),
      element("span", { className: "topic" }, name),
      element("pre", {}, compact.length <= 72 ? compact : JSON.stringify(data, null, 2)),
    ));
    while (log.childElementCount > maxShown) log.lastElementChild.remove();
    count();
  };

  byId("clear").addEventListener("click", () => {
    log.replaceChildren();
    count();
  });

  const chips = new Map(); // by the subscription's name
  const subscribe = async (topic, options) => {
    const name = options ? `${topic} ${JSON.stringify(options)}` : topic;
    const old = chips.get(name);
    if (old && !old.classList.contains("denied")) return;
    const chip = element("li", {}, element("span", { title: name }, name));
    const onDenied = (denied) => {
      chip.classList.toggle("denied", denied);
      chip.firstChild.title = denied ? `${name}: you are not allowed to listen to it` : name;
      if (denied && chip.isConnected) setText(error, notAllowed(topic));
    };
    await connection.subscribe(name, topic, options, (data) => add(name, data), onDenied);
    const remove = element("button", { type: "button", ariaLabel: `Unsubscribe from ${name}` }, "×");
    remove.addEventListener("click", () => {
      chip.remove();
      chips.delete(name);
      setText(error, "");
      connection.unsubscribe(name);
    });
    chip.append(remove);
    chips.set(name, chip);
    if (old) old.replaceWith(chip); // allowed at last
    else byId("topics").append(chip);
  };

  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    setText(error, "");
    try {
      await subscribe(form.elements.topic.value, parseOptions(form.elements.options.value));
    } catch (failure) {
      setText(error, failure.status === 403 ? notAllowed(form.elements.topic.value) : describe(failure));
    }
  });
}

const notAllowed = (topic) => `You are not allowed to listen to “${topic}”.`;

/** The options of a subscription, undefined for none. */
function parseOptions(text) {
  if (!text.trim()) return undefined;
  let options;
  try {
    options = JSON.parse(text);
  } catch {
    throw new Error("The options are not JSON.");
  }
  if (options === null || typeof options !== "object" || Array.isArray(options)) {
    throw new Error('The options must be an object like {"query": {…}}.');
  }
  return options;
}
