/// <reference path="../pb_data/types.d.ts" />

// The one channel of the chat: everybody who is signed in may read and write in each room. Rooms need not be created.
migrate((app) => {
  const signedIn = '@request.auth.id != ""';
  app.save(new Record(app.findCollectionByNameOrId("notify_channels"), {
    pattern: "chat/{room}",
    subscribeRule: signedIn,
    publishRule: signedIn,
    rateLimit: 5,
    maxSize: 4096,
    history: 200,
    presence: true,
    presenceRule: signedIn,
    presenceFields: "name",
  }));
}, (app) => {
  app.delete(app.findFirstRecordByData("notify_channels", "pattern", "chat/{room}"));
});
