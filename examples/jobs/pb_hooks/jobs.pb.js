/// <reference path="../pb_data/herald.d.ts" />

// POST /api/export does some work and tells the user who asked for it, in all tabs, how far it is.
routerAdd("POST", "/api/export", (e) => {
  const user = `${e.auth.collection().name}:${e.auth.id}`;
  const tell = (data) => $notify.send({ topic: "export", data: data, to: { users: [user] } });
  const steps = 5;
  for (let i = 1; i <= steps; i++) {
    sleep(300); // a fifth of the work
    tell({ percent: (100 * i) / steps });
  }
  return e.json(200, { rows: 1234 });
}, $apis.requireAuth());
