// The page in Chromium, as a person uses it.

import assert from "node:assert/strict";
import { mkdir } from "node:fs/promises";
import { join } from "node:path";
import { test } from "node:test";

import { addUser, Herald, launchBrowser, password, root as repository, send, setClockAhead, until } from "./kit.mjs";
import { RudeProxy } from "./proxy.mjs";

const pictures = join(repository, "e2e/output");

/** A tab of a context in which every console message above info is a failure. */
async function openTab(context, url, problems) {
  const tab = await context.newPage();
  tab.setDefaultTimeout(10_000);
  tab.on("console", (message) => ["error", "warning"].includes(message.type()) && problems.push(message.text()));
  tab.on("pageerror", (error) => problems.push(String(error)));
  await tab.goto(url);
  return tab;
}

/** Takes the problems that a test brought about on purpose off the list. */
function forgive(problems, pattern) {
  problems.splice(0, problems.length, ...problems.filter((problem) => !pattern.test(problem)));
}

const state = (tab) => tab.locator("#state");

async function connected(tab) {
  await tab.locator('#state[data-state="connected"]').waitFor();
}

async function signIn(tab, collection, email) {
  await tab.getByRole("button", { name: "Sign in", exact: true }).click();
  const dialog = tab.getByRole("dialog");
  await dialog.locator("select").selectOption(collection);
  await dialog.getByLabel("Email").fill(email);
  await dialog.getByLabel("Password").fill(password);
  await dialog.getByRole("button", { name: "Sign in" }).click();
  await dialog.waitFor({ state: "hidden" });
  await connected(tab);
}

async function subscribe(tab, topic, options) {
  await tab.locator("#subscribe-form").getByLabel("Topic").fill(topic);
  if (options !== undefined) {
    if (!(await tab.getByLabel("Query and headers").isVisible())) await tab.getByText("Options", { exact: true }).click();
    await tab.getByLabel("Query and headers").fill(options);
  }
  await tab.getByRole("button", { name: "Subscribe", exact: true }).click();
}

const messages = (tab) => tab.locator("#messages > li");
const text = (locator) => locator.evaluateAll((items) => items.map((item) => item.querySelector(".topic").textContent + " " + item.querySelector("pre").textContent));

test("page", async (t) => {
  const herald = await (await Herald.install(t)).start();
  const root = await herald.superuser();
  const ann = await addUser(root, "ann@example.com", { name: "Ann" });
  const browser = await launchBrowser(t);
  await mkdir(pictures, { recursive: true });

  const problems = [];
  const annContext = await browser.newContext();
  const rootContext = await browser.newContext({ viewport: { width: 1280, height: 900 } });
  const annTab = await openTab(annContext, herald.url, problems);
  const rootTab = await openTab(rootContext, herald.url, problems);

  await t.test("a guest subscribes and sees what comes", async () => {
    await connected(annTab);
    assert.equal(await annTab.locator("#who").textContent(), "guest");
    assert.ok(await annTab.getByLabel("Who of the subscribers").isHidden());
    await subscribe(annTab, "example");
    await annTab.locator("#topics li").waitFor();
    await send(root, { topic: "example", data: { text: "<b>Hello</b>", list: [1, 2, 3] } });
    await messages(annTab).first().waitFor();
    assert.deepEqual(await text(messages(annTab)), ['example {"text":"<b>Hello</b>","list":[1,2,3]}']);
  });

  await t.test("options, with a mistake in them first", async () => {
    await subscribe(annTab, "example", "{");
    await annTab.getByText("The options are not JSON.").waitFor();
    await subscribe(annTab, "example", '{"query":{"lang":"de"}}');
    await annTab.locator("#topics li").nth(1).waitFor();
    await send(root, { topic: "example", data: { n: 2 } });
    await messages(annTab).nth(2).waitFor();
    assert.deepEqual((await text(messages(annTab))).slice(0, 2).sort(), ['example {"n":2}', 'example {"query":{"lang":"de"}} {"n":2}']);
    await annTab.getByRole("button", { name: 'Unsubscribe from example {"query"' }).click();
    await annTab.getByLabel("Query and headers").fill("");
    await annTab.getByText("Options", { exact: true }).click();
  });

  await t.test("a wrong password", async () => {
    await annTab.getByRole("button", { name: "Sign in", exact: true }).click();
    const dialog = annTab.getByRole("dialog");
    await dialog.getByLabel("Email").fill("ann@example.com");
    await dialog.getByLabel("Password").fill("wrong");
    await annTab.keyboard.press("Enter");
    await dialog.getByText("Failed to authenticate").waitFor();
    await annTab.keyboard.press("Escape");
    forgive(problems, /status of 400/); // the browser's own line
  });

  await t.test("signing in, and the superuser sends", async () => {
    await signIn(annTab, "users", "ann@example.com");
    assert.equal(await annTab.locator("#who").textContent(), "Ann");
    await signIn(rootTab, "_superusers", root.email);
    await subscribe(rootTab, "example");
    await rootTab.locator("#topics li").waitFor();

    const form = rootTab.locator("#send-form");
    await form.getByLabel("Data, as JSON").fill('{"text": "For Ann"}');
    await form.getByText("Narrow further").click();
    await form.getByLabel("Users", { exact: true }).fill(`users:${ann.id}`);
    await form.getByRole("button", { name: "Send" }).click();
    await rootTab.getByText("Queued for 1 of 1 matching connections").waitFor();
    await annTab.getByText("For Ann").waitFor();
    assert.equal(await messages(rootTab).count(), 0);

    await form.getByLabel("Users", { exact: true }).fill("");
    await form.getByLabel("Data, as JSON").fill('{"text": "For all", "progress": {"done": 40, "of": 100, "job": "export of the year 2026"}}');
    await form.getByRole("button", { name: "Send" }).click();
    await rootTab.getByText("Queued for 2 of 2 matching connections").waitFor();
    await messages(rootTab).first().waitFor();
    assert.match(await rootTab.locator("#code-send").textContent(), /-d '\{"topic":"example","data":\{"text":"For all"/);
  });

  await t.test("mistakes are shown at their fields", async () => {
    const form = rootTab.locator("#send-form");
    await form.getByLabel("Data, as JSON").fill("{");
    await form.getByRole("button", { name: "Send" }).click();
    await form.getByText("The data is not JSON.").waitFor();
    await form.getByLabel("Data, as JSON").fill("1");
    await form.getByLabel("Filter on the user").fill("nope = 1");
    await form.getByLabel("Topic").fill("@inbox");
    await form.getByRole("button", { name: "Send" }).click();
    await form.locator('[data-error="to.filter"]', { hasText: "nope" }).waitFor();
    await form.locator('[data-error="topic"]', { hasText: "reserved" }).waitFor();
    forgive(problems, /status of 400/);
    await form.getByLabel("Filter on the user").fill("");
    await form.getByLabel("Topic").fill("example");
  });

  const secondTab = await openTab(annContext, herald.url, problems);
  await t.test("the bell, in two tabs", async () => {
    await connected(secondTab);
    assert.equal(await secondTab.locator("#who").textContent(), "Ann"); // signed in already
    const badges = [annTab, secondTab].map((tab) => tab.locator("#bell-count"));
    const both = (count) => Promise.all(badges.map((badge) => until(`the count is ${count}`, async () => (await badge.textContent()) === String(count))));
    for (const tab of [annTab, secondTab]) await tab.locator("#bell").waitFor();
    await both(0);

    for (const [title, body] of [["Your export is ready", "2,031 rows"], ["Bob mentioned you", "in “Release notes”"]]) {
      await root.collection("notifications").create({ user: ann.id, title, body });
    }
    await both(2);
    await annTab.bringToFront();
    await annTab.locator("#bell-button").click();
    await annTab.locator("#bell-list li", { hasText: "Your export is ready" }).getByRole("button", { name: "Mark as read" }).click();
    await both(1);
    await annTab.getByRole("button", { name: "Mark all as read" }).click();
    await both(0);
    await annTab.locator("#bell-list li").first().getByRole("button", { name: "Delete" }).click();
    await until("the entry is gone in both tabs", async () =>
      (await annTab.locator("#bell-list li").count()) === 1 && (await secondTab.locator("#bell-list li").count()) === 1);
    await annTab.keyboard.press("Escape");
    assert.ok(await annTab.locator("#bell-panel").isHidden());
    assert.ok(await rootTab.locator("#bell").isHidden()); // a superuser has no inbox
  });

  await t.test("the connection's state over a restart of the server", async () => {
    await herald.stop();
    await annTab.locator('#state[data-state="reconnecting"]').waitFor();
    assert.equal(await state(annTab).textContent(), "reconnecting");
    await root.realtime.unsubscribe();
    await herald.start();
    await connected(annTab);
    await connected(rootTab);
    await root.collection("notifications").create({ user: ann.id, title: "After the restart" });
    await until("the bell goes on", async () => (await annTab.locator("#bell-count").textContent()) === "1");
    await send(root, { topic: "example", data: { text: "up again" } });
    await annTab.getByText("up again").waitFor();
    forgive(problems, /ERR_|Failed to load resource/);
  });

  await t.test("a correction takes the error away", async () => {
    const form = rootTab.locator("#send-form");
    assert.ok(await form.locator('[data-error="topic"]').isHidden());
    assert.ok(await form.locator('[data-error="to.filter"]').isHidden());
    await form.getByText("Narrow further").click();
    await form.getByLabel("Data, as JSON").fill('{"job": "export", "done": 40}');
    await form.getByRole("button", { name: "Send" }).click();
    await rootTab.getByText("Queued for 2 of 2 matching connections").waitFor();
  });

  await t.test("pictures, in both themes and on a phone", async () => {
    const sizes = { desktop: { width: 1280, height: 860 }, phone: { width: 390, height: 844 } };
    for (const [size, viewport] of Object.entries(sizes)) {
      for (const colorScheme of ["light", "dark"]) {
        for (const [who, tab] of [["superuser", rootTab], ["user", annTab]]) {
          await tab.bringToFront();
          await tab.emulateMedia({ colorScheme, reducedMotion: "reduce" });
          await tab.setViewportSize(viewport);
          if (who === "user") await tab.locator("#bell-button").click();
          const code = tab.locator("details.code");
          await code.evaluate((details) => (details.open = true));
          const wide = await tab.evaluate(() => document.documentElement.scrollWidth - innerWidth);
          assert.ok(wide <= 0, `${who} on ${size}: the page is ${wide}px too wide`);
          await code.evaluate((details) => (details.open = false));
          await tab.screenshot({ path: join(pictures, `${who}-${size}-${colorScheme}.png`), fullPage: true });
          if (who === "user") await tab.locator("#bell-button").click();
        }
      }
    }
  });

  await t.test("signing out while the notifications load", async () => {
    // the answers wait until she has signed out
    let release;
    const held = new Promise((resolve) => (release = resolve));
    await secondTab.route("**/api/collections/notifications/**", async (route) => {
      const answer = await route.fetch();
      await held;
      await route.fulfill({ response: answer });
    });
    await secondTab.bringToFront();
    const asked = secondTab.waitForRequest("**/api/collections/notifications/**");
    await secondTab.reload();
    await asked;
    await secondTab.getByRole("button", { name: "Sign out" }).click();
    const late = secondTab.waitForResponse("**/api/collections/notifications/**");
    release();
    await (await late).finished();
    await connected(secondTab);
    assert.ok(await secondTab.locator("#bell").isHidden());
    assert.equal(await secondTab.locator("#bell-list li").count(), 0);
    await secondTab.unroute("**/api/collections/notifications/**");
    await until("the other tab is signed out, too", async () => (await annTab.locator("#who").textContent()) === "guest");
    await signIn(annTab, "users", "ann@example.com");
    await annTab.locator("#bell").waitFor();
    await until("the second tab is signed in, too", async () => (await secondTab.locator("#who").textContent()) === "Ann");
  });

  await t.test("signing out", async () => {
    await annTab.getByRole("button", { name: "Sign out" }).click();
    await until("both tabs are signed out", async () =>
      (await annTab.locator("#who").textContent()) === "guest" && (await secondTab.locator("#who").textContent()) === "guest");
    assert.ok(await annTab.locator("#bell").isHidden());
    await connected(annTab);
    const reached = async (to) => (await send(root, { topic: "example", data: { n: 1 }, to })).matched;
    await until("no connection is Ann's any more", async () => (await reached({ users: [`users:${ann.id}`] })) === 0);
    await until("her tab listens as a guest", async () => (await reached({ auth: "guest" })) === 1);
  });

  assert.deepEqual(problems, []);
});

test("a private room in two browsers, and a third", async (t) => {
  const herald = await (await Herald.install(t)).start();
  const root = await herald.superuser();
  const people = {};
  for (const name of ["Ann", "Bob", "Eve"]) people[name] = await addUser(root, `${name.toLowerCase()}@example.com`, { name });
  const users = await root.collections.getOne("users");
  await root.collections.create({
    name: "room_members",
    type: "base",
    fields: [{ name: "room", type: "text" }, { name: "user", type: "relation", collectionId: users.id }],
  });
  const members = root.collection("room_members");
  const memberships = {};
  for (const name of ["Ann", "Bob"]) memberships[name] = await members.create({ room: "42", user: people[name].id });
  const rule = "@collection.room_members.room ?= @request.query.room && @collection.room_members.user ?= @request.auth.id";
  await root.collection("notify_channels").create({ pattern: "chat/{room}", subscribeRule: rule, publishRule: rule });

  const browser = await launchBrowser(t);
  await mkdir(pictures, { recursive: true });
  const problems = [];
  const tabs = {};
  for (const name of ["Ann", "Bob", "Eve"]) tabs[name] = await openTab(await browser.newContext({ viewport: { width: 1280, height: 860 } }), herald.url, problems);
  const say = async (name, text) => {
    await tabs[name].locator("#send-form").getByLabel("Topic").fill("chat/42");
    await tabs[name].getByLabel("Data, as JSON").fill(JSON.stringify({ text }));
    await tabs[name].getByRole("button", { name: "Send" }).click();
  };
  const refused = (name) => tabs[name].getByText("You are not allowed to listen to").waitFor();

  // not signed in nobody listens
  for (const name of ["Ann", "Eve"]) {
    await connected(tabs[name]);
    await subscribe(tabs[name], "chat/42");
    await refused(name);
    assert.equal(await tabs[name].locator("#topics li").count(), 0);
  }
  await say("Ann", "as a guest");
  await tabs.Ann.getByText("You are not allowed to publish to this topic.").waitFor();
  for (const name of ["Ann", "Bob", "Eve"]) await signIn(tabs[name], "users", `${name.toLowerCase()}@example.com`);
  for (const name of ["Ann", "Bob"]) {
    await subscribe(tabs[name], "chat/42");
    await tabs[name].locator("#topics li").waitFor();
  }
  await subscribe(tabs.Eve, "chat/42");
  await refused("Eve");

  await say("Ann", "Hello Bob");
  for (const name of ["Ann", "Bob"]) await tabs[name].locator("#messages").getByText("Hello Bob").waitFor();
  await say("Bob", "Hello Ann");
  for (const name of ["Ann", "Bob"]) await tabs[name].locator("#messages").getByText("Hello Ann").waitFor();
  await say("Eve", "Let me in");
  await tabs.Eve.getByText("You are not allowed to publish to this topic.").waitFor();

  // without oneself, and with the sender's name
  await subscribe(tabs.Bob, "chat/42", '{"query": {"envelope": true}}');
  await tabs.Bob.locator("#topics li").nth(1).waitFor();
  await tabs.Ann.getByLabel("Also to this connection").uncheck();
  await say("Ann", "Only for Bob");
  await tabs.Bob.locator("#messages").getByText(`"from": "users:${people.Ann.id}"`).waitFor();
  await tabs.Ann.screenshot({ path: join(pictures, "room-member.png"), fullPage: true });
  await tabs.Eve.screenshot({ path: join(pictures, "room-stranger.png"), fullPage: true });

  // thrown out
  await members.delete(memberships.Bob.id);
  await tabs.Bob.locator("#topics li.denied").nth(1).waitFor();
  await refused("Bob");
  await tabs.Ann.getByLabel("Also to this connection").check();
  await say("Ann", "Now we are alone");
  await tabs.Ann.locator("#messages").getByText("Now we are alone").waitFor();
  await tabs.Bob.screenshot({ path: join(pictures, "room-removed.png"), fullPage: true });

  // and in again
  await members.create({ room: "42", user: people.Bob.id });
  await subscribe(tabs.Bob, "chat/42", "");
  await tabs.Bob.locator("#topics li:not(.denied)").waitFor();
  await say("Bob", "I am back");
  for (const name of ["Ann", "Bob"]) await tabs[name].locator("#messages").getByText("I am back").waitFor();

  // a sign-out ends it, a sign-in brings it back
  await tabs.Ann.getByRole("button", { name: "Sign out" }).click();
  await tabs.Ann.locator("#topics li.denied").waitFor();
  await connected(tabs.Ann);
  await signIn(tabs.Ann, "users", "ann@example.com");
  await tabs.Ann.locator("#topics li:not(.denied)").waitFor();
  await say("Bob", "Welcome");
  await tabs.Ann.locator("#messages").getByText("Welcome").waitFor();

  const texts = async (name) => (await text(messages(tabs[name]))).join();
  assert.doesNotMatch(await texts("Ann"), /Only for Bob|Let me in|as a guest/);
  assert.doesNotMatch(await texts("Bob"), /alone|Let me in|as a guest/);
  assert.equal(await texts("Eve"), "");
  forgive(problems, /status of 403/); // the browser's own lines
  assert.deepEqual(problems, []);
});

test("two browsers see who is there, and who is typing", async (t) => {
  const herald = await (await Herald.install(t)).start();
  const root = await herald.superuser();
  for (const name of ["Ann", "Bob"]) await addUser(root, `${name.toLowerCase()}@example.com`, { name });
  await root.collection("notify_channels").create({
    pattern: "room/{room}", subscribeRule: "*", publishRule: '@request.auth.id != ""', presence: true, presenceRule: '@request.auth.id != ""', presenceFields: "name",
  });
  const browser = await launchBrowser(t);
  await mkdir(pictures, { recursive: true });
  const problems = [];
  const tabs = {};
  for (const name of ["Ann", "Bob"]) {
    tabs[name] = await openTab(await browser.newContext({ viewport: { width: 1280, height: 860 } }), herald.url, problems);
    await connected(tabs[name]);
    await tabs[name].getByLabel("Show who is here").check();
    await subscribe(tabs[name], "room/1");
    await tabs[name].getByText("Who is on “room/1” is not shown to you.").waitFor(); // a guest
  }
  forgive(problems, /403/);
  for (const name of ["Ann", "Bob"]) await signIn(tabs[name], "users", `${name.toLowerCase()}@example.com`);
  for (const name of ["Ann", "Bob"]) {
    for (const person of ["Ann", "Bob"]) await tabs[name].locator("#here .person").getByText(person).waitFor();
  }
  await tabs.Ann.locator("#send-form").getByLabel("Topic").fill("room/1");
  await tabs.Ann.getByLabel("Data, as JSON").pressSequentially(" ");
  await tabs.Bob.locator("#here .person.typing").getByText("Ann").waitFor();
  await tabs.Bob.screenshot({ path: join(pictures, "presence.png") });
  await tabs.Ann.getByRole("button", { name: "Send", exact: true }).click();
  await tabs.Bob.locator("#here .person:not(.typing)").getByText("Ann").waitFor();

  await tabs.Ann.getByRole("button", { name: "Sign out" }).click();
  await tabs.Bob.locator("#here").getByText("1 guest").waitFor();
  await tabs.Ann.locator("#here").waitFor({ state: "hidden" });
  await tabs.Bob.getByRole("button", { name: "Unsubscribe from room/1" }).click();
  await tabs.Bob.locator("#here").waitFor({ state: "hidden" });
  forgive(problems, /403/); // Ann is a guest now
  assert.deepEqual(problems, []);
});

test("the server says who is signed in, not the device's clock", async (t) => {
  const herald = await (await Herald.install(t)).start();
  const root = await herald.superuser();
  const ann = await addUser(root, "ann@example.com", { name: "Ann" });
  const browser = await launchBrowser(t);
  const problems = [];
  const tab = await openTab(await browser.newContext(), herald.url, problems);
  const who = tab.locator("#who");
  await signIn(tab, "users", "ann@example.com");
  await setClockAhead(tab);
  await tab.reload();
  await connected(tab);
  assert.equal(await who.textContent(), "Ann");
  await until("she is connected", async () => (await root.send("/api/notify/clients", { query: { user: `users:${ann.id}` } })).items.length > 0);

  // nobody but the server knows that her token has ended
  await tab.goto("about:blank");
  await root.collection("users").update(ann.id, { password: "another password", passwordConfirm: "another password" });
  await tab.goto(herald.url);
  await until("she is a guest", async () => (await who.textContent()) === "guest");
  await connected(tab);
  forgive(problems, /status of 40[13]/);
  assert.deepEqual(problems, []);
});

test("page with the keyboard alone", async (t) => {
  const herald = await (await Herald.install(t)).start();
  const root = await herald.superuser();
  const browser = await launchBrowser(t);
  const tab = await openTab(await browser.newContext(), herald.url, []);
  await connected(tab);

  const focusOn = (selector) => until(`the focus reaches ${selector}`, async () => {
    if (await tab.evaluate((selector) => document.activeElement.matches(selector), selector)) return true;
    await tab.keyboard.press("Tab");
    return false;
  });
  await focusOn("#sign-in");
  await tab.keyboard.press("Enter");
  await focusOn("dialog select");
  await tab.keyboard.press("s"); // superuser
  await focusOn('dialog [name="identity"]');
  await tab.keyboard.type(root.email);
  await focusOn('dialog [name="password"]');
  await tab.keyboard.type(password);
  await tab.keyboard.press("Enter");
  await tab.getByLabel("Who of the subscribers").waitFor();
  await connected(tab);
  await focusOn('#subscribe-form [name="topic"]');
  await tab.keyboard.press("Enter");
  await tab.locator("#topics li").waitFor();
  await focusOn("#send-form button.primary");
  await tab.keyboard.press("Enter");
  await messages(tab).first().waitFor();
  assert.deepEqual(await text(messages(tab)), ['example {"text":"Hello"}']);
});

test("the page catches up on what was missed", async (t) => {
  const herald = await (await Herald.install(t)).start();
  const root = await herald.superuser();
  const channel = await root.collection("notify_channels").create({ pattern: "log", subscribeRule: "*", history: 5 });
  for (const n of [1, 2, 3]) await send(root, { topic: "log", data: { n } });
  const browser = await launchBrowser(t);
  const problems = [];
  const tab = await openTab(await browser.newContext(), herald.url, problems);
  await connected(tab);
  await mkdir(pictures, { recursive: true });

  // options that do not go together
  const error = tab.locator("#subscribe-error");
  const box = tab.getByLabel("Catch up on what was missed");
  await tab.getByText("Options", { exact: true }).click();
  await tab.getByLabel("Begin with the last messages").fill("2");
  await tab.getByRole("button", { name: "Subscribe", exact: true }).click();
  await error.getByText("Only a subscription that catches up").waitFor();
  await box.check();
  await subscribe(tab, "log", '{"query": {"envelope": true}}');
  await error.getByText("takes no query and headers").waitFor();

  // the last two, as replayed
  await subscribe(tab, "log", "");
  assert.match(await tab.locator("#code-receive").textContent(), /^import \{ subscribe \} from "\/herald\.js";\n\nsubscribe\(pb, "log", [^]*, \{ rewind: "2" \}\);$/);
  await tab.locator('#topics li[data-state="live"]').waitFor();
  assert.deepEqual(await text(messages(tab)), ['log (with history)#3replayed {"n":3}', 'log (with history)#2replayed {"n":2}']);
  await send(root, { topic: "log", data: { n: 4 } });
  await messages(tab).nth(2).waitFor();
  assert.equal((await text(messages(tab)))[0], 'log (with history)#4 {"n":4}');

  // the plug is pulled: nothing is missing afterwards
  await tab.getByRole("button", { name: "Cut the connection" }).click();
  await tab.locator('#topics li[data-state="connecting"]').waitFor();
  await tab.getByRole("button", { name: "Cut, for" }).waitFor();
  for (const n of [5, 6]) await send(root, { topic: "log", data: { n } });
  await tab.locator('#topics li[data-state="live"]').waitFor();
  assert.deepEqual((await text(messages(tab))).slice(0, 3),
    ['log (with history)#6replayed {"n":6}', 'log (with history)#5replayed {"n":5}', 'log (with history)#4 {"n":4}']);
  await tab.getByRole("button", { name: "Cut the connection for 5 s" }).waitFor();
  await send(root, { topic: "log", data: { n: 7 } });
  await messages(tab).nth(5).waitFor();
  assert.equal((await text(messages(tab)))[0], 'log (with history)#7 {"n":7}');

  // more than is kept
  await root.collection("notify_channels").update(channel.id, { history: 1 });
  await tab.getByRole("button", { name: "Cut the connection" }).click();
  await tab.locator('#topics li[data-state="connecting"]').waitFor();
  for (const n of [8, 9, 10]) await send(root, { topic: "log", data: { n } });
  await tab.getByText("Messages up to #9 are missing").waitFor();
  await messages(tab).getByText('{"n":10}').waitFor();
  await tab.screenshot({ path: join(pictures, "recovery.png"), fullPage: true });

  await tab.getByRole("button", { name: "Unsubscribe from log" }).click();
  await until("it is unsubscribed", async () => !(await root.send("/api/notify/topics", {})).items.some(({ topic }) => topic === "log"));
  assert.deepEqual(problems, []);
});

test("the page below a path of its host", async (t) => {
  const herald = await (await Herald.install(t)).start();
  const root = await herald.superuser();
  const proxy = await RudeProxy.to(herald.port);
  t.after(() => proxy.close());
  proxy.path = "/pb";
  const browser = await launchBrowser(t);
  const problems = [];
  const tab = await openTab(await browser.newContext(), `${proxy.url}/pb/`, problems);
  await connected(tab);
  await subscribe(tab, "example");
  await tab.locator("#topics li").waitFor();
  await send(root, { topic: "example", data: "below" });
  await messages(tab).first().waitFor();
  assert.deepEqual(await text(messages(tab)), ['example "below"']);
  const icon = tab.locator(".brand img");
  assert.ok(await icon.evaluate((image) => image.complete && image.naturalWidth > 0));
  await signIn(tab, "_superusers", "root@example.com");
  await tab.getByRole("button", { name: "Send" }).click();
  await messages(tab).nth(1).waitFor();
  assert.match(await tab.locator("#code-send").textContent(), new RegExp(`curl ${proxy.url}/pb/api/notify`));
  await tab.getByRole("link", { name: "Dashboard" }).first().click();
  await tab.waitForURL(`${proxy.url}/pb/_/**`);
  await tab.locator("input[type=password]").waitFor(); // it has loaded, and reached the API
  assert.deepEqual(problems, []);
});
