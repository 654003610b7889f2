// Sends messages, as a superuser to whomever, as others where a channel lets them,
// and shows how code would.

import { byId, describe, fieldErrors, server, setText } from "./dom.js";

export function bindSender(pb) {
  const form = byId("send-form");
  const report = byId("report");
  const errors = [...form.querySelectorAll("[data-error]")];

  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    setText(report, "");
    for (const place of errors) setText(place, "");

    let body;
    try {
      body = pb.authStore.isSuperuser ? readMessage(form) : readPublication(form);
    } catch {
      setText(form.querySelector('[data-error="data"]'), "The data is not JSON.");
      return;
    }
    try {
      if (!pb.authStore.isSuperuser) {
        // tells which connection is the sender's own
        if (!body.self) body.clientId = pb.realtime.clientId;
        const { id } = await pb.send("/api/notify/publish", { method: "POST", body, requestKey: null });
        setText(report, `Published. Message id ${id}.`);
        return;
      }
      const result = await pb.send("/api/notify", { method: "POST", body, requestKey: null });
      setText(report, `Queued for ${result.queued} of ${result.matched} matching connections` +
        `${result.dropped ? `, dropped for ${result.dropped}` : ""}. Message id ${result.id}.`);
    } catch (failure) {
      showErrors(errors, failure, report);
    }
  });

  // what is being corrected is no longer wrong
  form.addEventListener("input", ({ target }) => {
    const error = target.closest("label")?.nextElementSibling;
    if (error?.matches("[data-error]")) setText(error, "");
  });

  const code = () => showCode(form, byId("subscribe-form"), pb.authStore.isSuperuser);
  form.addEventListener("input", code);
  byId("subscribe-form").addEventListener("input", code);
  pb.authStore.onChange(() => {
    setText(report, "");
    for (const place of errors) setText(place, "");
    code();
  });
  code();
}

/** The message that the form describes, of one who is no superuser. */
function readPublication(form) {
  const { topic, data, self } = form.elements;
  return { topic: topic.value, data: JSON.parse(data.value), self: self.checked };
}

/** The message that the form describes, without its empty parts. */
function readMessage(form) {
  const { topic, data, auth, users, collections, filter, clients, exceptUsers, exceptClients } = form.elements;
  const message = { topic: topic.value, data: JSON.parse(data.value) };
  const to = withoutEmpty({
    auth: auth.value === "any" ? "" : auth.value,
    users: list(users.value),
    collections: list(collections.value),
    filter: filter.value.trim(),
    clients: list(clients.value),
  });
  const except = withoutEmpty({ users: list(exceptUsers.value), clients: list(exceptClients.value) });
  if (Object.keys(to).length) message.to = to;
  if (Object.keys(except).length) message.except = except;
  return message;
}

const list = (text) => text.split(",").map((item) => item.trim()).filter(Boolean);

const withoutEmpty = (object) => Object.fromEntries(Object.entries(object).filter(([, value]) => value.length));

/** Puts each field's error below its field, what has no place into rest. */
function showErrors(places, failure, rest) {
  const left = fieldErrors(failure);
  for (const place of places) {
    const path = place.dataset.error;
    const mine = Object.keys(left).filter((field) => field === path || field.startsWith(`${path}.`));
    setText(place, mine.map((field) => left[field]).join(" "));
    if (mine.length) place.closest("details")?.setAttribute("open", "");
    for (const field of mine) delete left[field];
  }
  if (Object.keys(left).length || places.every((place) => place.hidden)) setText(rest, describe(failure));
}

/** What subscribes as the form would. */
function receivingCode({ topic: { value: topic }, options, recover, rewind, who }) {
  const name = JSON.stringify(topic);
  const functions = [...(recover.checked ? ["subscribe"] : []), ...(who.checked ? ["presence"] : [])];
  const parts = functions.length ? [`import { ${functions.join(", ")} } from "${new URL(`${server}/herald.js`, location).pathname}";`] : [];
  if (recover.checked) {
    const begin = rewind.value.trim();
    parts.push(`subscribe(pb, ${name}, ({ data }) => {\n  console.log(data);\n}${begin && `, { rewind: ${JSON.stringify(begin)} }`});`);
  } else {
    const rest = options.value.trim();
    parts.push(`pb.realtime.subscribe(${name}, (data) => {\n  console.log(data);\n}${rest && `, ${rest}`});`);
  }
  if (who.checked) {
    parts.push(`const members = await presence(pb, ${name}, {\n  join: false, // only watch\n  onChange: () => console.log([...members.values()]),\n});`);
  }
  return parts.join("\n\n");
}

function showCode(form, subscribeForm, isSuperuser) {
  byId("code-receive").textContent = receivingCode(subscribeForm.elements);
  let message;
  try {
    message = isSuperuser ? JSON.stringify(readMessage(form)) : JSON.stringify(readPublication(form), null, 2);
  } catch {
    return; // half-typed data: keep the last
  }
  byId("code-send-how").textContent = isSuperuser ? "Send, from your server" : "Publish, with the JavaScript SDK";
  byId("code-send").textContent = !isSuperuser ?
    `pb.send("/api/notify/publish", {\n  method: "POST",\n  headers: { "X-Client-Id": pb.realtime.clientId },\n  body: ${message.replaceAll("\n", "\n  ")},\n  requestKey: null,\n});` :
    `curl ${server}/api/notify \\\n  -H "Authorization: $TOKEN" \\\n  -d '${message.replaceAll("'", "'\\''")}'`;
}
