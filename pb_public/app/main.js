// Herald's playground, over the stock PocketBase SDK.

import { byId, describe, server, setText } from "./dom.js";
import { Bell } from "./bell.js";
import { Connection } from "./connection.js";
import { Here } from "./here.js";
import { bindReceiver } from "./receiver.js";
import { bindSender } from "./sender.js";
import { installPlug } from "./plug.js";
import { bindSession } from "./session.js";

async function start() {
  const sdk = await import("../lib/pocketbase.es.mjs").catch(() => null);
  if (!sdk) {
    byId("state").dataset.state = "unavailable";
    byId("state").textContent = "unavailable";
    setText(byId("notice"), "This page was built without the PocketBase JavaScript SDK, because Node.js was missing. " +
      "Install Node.js and run “make build” again. The server itself needs neither.");
    for (const control of document.querySelectorAll("main button, main input, .account button")) control.disabled = true;
    return;
  }

  installPlug();
  const pb = new sdk.default(server, new sdk.LocalAuthStore("herald_auth"));
  const connection = new Connection(pb);
  const bell = new Bell(pb, connection);

  const connect = async () => {
    try {
      bell.stop();
      await connection.open();
      await bell.start();
    } catch (error) {
      setText(byId("notice"), `The realtime connection failed: ${describe(error)} Reload the page to try again.`);
    }
  };

  // herald.js has a connection of its own, which it keeps over sign-ins
  const recoverer = new sdk.default(server, pb.authStore);

  bindReceiver(connection, recoverer, new Here(recoverer));
  bindSender(pb);
  bindSession(pb, connect);
  await connect();
}

start();
