/// <reference path="../pb_data/herald.d.ts" />

// A message is a text, and its author's name is the one that the server knows.
onNotifyPublish((e) => {
  if (e.topic.startsWith("chat/")) {
    if (typeof e.data?.text !== "string" || !e.data.text.trim()) throw new BadRequestError("A message needs a text.");
    e.data = { text: e.data.text, name: e.auth.getString("name") };
  }
  e.next();
});
