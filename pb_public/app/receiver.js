// Subscriptions and the messages that come.

import { subscribe as recover } from "../herald.js";
import { byId, describe, element, setText, timeOf } from "./dom.js";
import { pullPlug } from "./plug.js";

const maxShown = 200;

/** recoverer is the SDK client of the subscriptions that catch up, here shows who else is there. */
export function bindReceiver(connection, recoverer, here) {
  const form = byId("subscribe-form");
  const error = byId("subscribe-error");
  const log = byId("messages");

  const count = () => {
    byId("message-count").textContent = log.childElementCount || "";
    byId("messages-empty").hidden = log.childElementCount > 0;
    byId("clear").hidden = log.childElementCount === 0;
  };

  const prepend = (className, time, head, ...rest) => {
    log.prepend(element("li", { className }, element("time", { dateTime: time.toISOString() }, timeOf(time)), head, ...rest));
    while (log.childElementCount > maxShown) log.lastElementChild.remove();
    count();
  };

  const add = (name, data, time = new Date(), ...marks) => {
    const compact = JSON.stringify(data);
    const head = element("span", { className: "topic" }, name, ...marks.map((mark) => element("span", { className: "mark" }, mark)));
    prepend("", time, head, element("pre", {}, compact.length <= 72 ? compact : JSON.stringify(data, null, 2)));
  };

  const addGap = (name, { since, first, head }) => {
    const to = first === null ? head : first - 1;
    const text = since ? `Messages up to ${to ? `#${to}` : "now"} are missing: the server does not keep them any more.` : "Messages may be missing.";
    prepend("gap", new Date(), element("span", { className: "topic" }, name, element("span", { className: "mark" }, "gap")), element("span", { className: "rest" }, text));
  };

  byId("cut").addEventListener("click", ({ target }) => pullPlug(5, (left) => {
    target.disabled = left > 0;
    target.textContent = left > 0 ? `Cut, for ${left} s` : "Cut the connection for 5 s";
  }));

  byId("clear").addEventListener("click", () => {
    log.replaceChildren();
    count();
  });

  const chips = new Map(); // by the subscription's name: {chip, stop}
  /** Subscribes by herald.js; returns how to end that. */
  const subscribeRecovering = (name, topic, rewind, chip, onDenied) => recover(recoverer, topic, (message) => {
    const { data, seq, time, replayed } = message;
    add(name, data, replayed ? new Date(time) : undefined, ...(seq ? [`#${seq}`] : []), ...(replayed ? ["replayed"] : []));
  }, {
    rewind: rewind || undefined,
    onGap: (gap) => addGap(name, gap),
    onState: (state) => {
      chip.dataset.state = state;
      onDenied(state === "denied");
    },
  });

  const subscribe = async (topic, options, rewind) => {
    const name = rewind !== undefined ? `${topic} (with history)` : options ? `${topic} ${JSON.stringify(options)}` : topic;
    const old = chips.get(name);
    if (old && !old.chip.classList.contains("denied")) return;
    const chip = element("li", {}, element("span", { title: name }, name));
    const onDenied = (denied) => {
      chip.classList.toggle("denied", denied);
      chip.firstChild.title = denied ? `${name}: you are not allowed to listen to it` : name;
      if (denied && chip.isConnected) setText(error, notAllowed(topic));
    };
    let stop = () => connection.unsubscribe(name);
    if (rewind === undefined) await connection.subscribe(name, topic, options, (data) => add(name, data), onDenied);
    else stop = await subscribeRecovering(name, topic, rewind, chip, onDenied);
    if (old && rewind !== undefined) old.stop();
    const remove = element("button", { type: "button", ariaLabel: `Unsubscribe from ${name}` }, "×");
    remove.addEventListener("click", () => {
      chip.remove();
      chips.delete(name);
      setText(error, "");
      stop();
      if (![...chips.values()].some((other) => other.topic === topic)) here.unwatch(topic);
    });
    chip.append(remove);
    chips.set(name, { chip, stop, topic });
    if (old) old.chip.replaceWith(chip); // allowed at last
    else byId("topics").append(chip);
  };

  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    setText(error, "");
    try {
      const { topic, options, recover, rewind, who } = form.elements;
      const parsed = parseOptions(options.value);
      if (parsed && recover.checked) throw new Error("A subscription that catches up takes no query and headers.");
      if (rewind.value && !recover.checked) throw new Error("Only a subscription that catches up begins with the last messages.");
      await subscribe(topic.value, parsed, recover.checked ? rewind.value.trim() : undefined);
      if (who.checked && !(await here.watch(topic.value))) setText(error, `Who is on “${topic.value}” is not shown to you.`);
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
