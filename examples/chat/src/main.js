// A chat in one page: sign in, see the last messages and who is here, write. The room is what follows # in the address.

import PocketBase from "pocketbase";
import { presence, subscribe } from "herald-pocketbase";

const pb = new PocketBase(location.origin);
const $ = (selector) => document.querySelector(selector);
const room = decodeURIComponent(location.hash.slice(1)) || "general";
const topic = `chat/${room}`;

$("#room").textContent = room;
addEventListener("hashchange", () => location.reload());
// the server says whether a token from last time still counts; this device's clock may be wrong
if (pb.authStore.token) pb.collection("users").authRefresh().then(enter, showSignIn);
else showSignIn();

$("#sign-in").onsubmit = async (event) => {
  event.preventDefault();
  const { email, password } = event.target.elements;
  try {
    await pb.collection("users").authWithPassword(email.value, password.value);
    await enter();
  } catch (error) {
    $("#sign-in [role=alert]").textContent = error.message;
  }
};

function showSignIn(error) {
  $("#sign-in").hidden = false;
  if (error) $("#sign-in [role=alert]").textContent = error.message;
}

async function enter() {
  $("#sign-in").hidden = true;
  $("main").hidden = false;
  const me = `users:${pb.authStore.record.id}`;

  // who is here, and who is typing: a flag that each member shows the others
  let members = new Map();
  const names = new Map([[me, pb.authStore.record.name]]); // also of those who have left
  const nameOf = (user) => names.get(user) || "Somebody";
  const showMembers = () => {
    for (const { user, fields } of members.values()) names.set(user, fields.name);
    $("#members").replaceChildren(...[...members.values()].map(({ user }) => element("li", nameOf(user))));
    const typing = [...members.values()].filter(({ user, meta }) => meta?.typing && user !== me);
    $("#typing").textContent = typing.length ? `${typing.map(({ user }) => nameOf(user)).join(", ")} is typing …` : "";
  };
  members = await presence(pb, topic, { onChange: showMembers });
  showMembers();

  // the last 50 messages, and then each that comes: once and in order, also if the connection was lost meanwhile
  const stop = await subscribe(pb, topic, ({ from, time, data }) => {
    const item = element("li", "", from === me ? "mine" : "");
    const at = new Date(time.replace(" ", "T")).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
    item.append(element("b", data.name), // as the server knows it: see pb_hooks
       element("time", at), element("p", data.text));
    $("#messages").append(item);
    item.scrollIntoView({ block: "end" });
  }, { rewind: 50, onState: (state) => ($("#state").textContent = state === "live" ? "" : state) });

  let timer;
  const notTyping = () => {
    clearTimeout(timer);
    timer = undefined;
    members.set(null);
  };
  $("#write").oninput = () => {
    if (timer === undefined) members.set({ typing: true });
    clearTimeout(timer);
    timer = setTimeout(notTyping, 3000);
  };
  $("#write").onsubmit = async (event) => {
    event.preventDefault();
    const { text } = event.target.elements;
    const written = text.value;
    text.value = "";
    notTyping();
    try {
      await pb.send("/api/notify/publish", { method: "POST", body: { topic, data: { text: written } }, requestKey: null });
    } catch (error) {
      text.value ||= written;
      $("#typing").textContent = `Not sent: ${error.message}`;
    }
  };
  $("#sign-out").onclick = async () => {
    await Promise.all([members.leave(), stop()]);
    pb.authStore.clear();
    location.reload();
  };
  $("#write input").focus();
}

function element(name, text, className = "") {
  return Object.assign(document.createElement(name), { textContent: text, className });
}
