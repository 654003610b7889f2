// Who is signed in.

import { byId, describe, setText } from "./dom.js";

/** Binds the sign-in dialog. onChange is called after every change of who is
 * signed in, also one made in another tab. */
export function bindSession(pb, onChange) {
  const dialog = byId("sign-in-dialog");
  const form = byId("sign-in-form");
  const error = byId("sign-in-error");

  const open = (collection) => {
    form.elements.collection.value = collection;
    setText(error, "");
    dialog.showModal();
    form.elements.identity.focus();
  };
  byId("sign-in").addEventListener("click", () => open("users"));
  byId("sign-in-superuser").addEventListener("click", () => open("_superusers"));
  byId("sign-in-cancel").addEventListener("click", () => dialog.close());
  byId("sign-out").addEventListener("click", () => pb.authStore.clear());

  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const { collection, identity, password } = form.elements;
    setText(error, "");
    try {
      await pb.collection(collection.value).authWithPassword(identity.value, password.value);
      password.value = "";
      dialog.close();
    } catch (failure) {
      setText(error, describe(failure));
    }
  });

  const show = () => {
    const { record } = pb.authStore; // not isValid, which asks this device's clock
    byId("who").textContent = record ? record.name || record.email : "guest";
    byId("who").title = record ? `${record.collectionName}:${record.id}` : "";
    byId("sign-in").hidden = Boolean(record);
    byId("sign-out").hidden = !record;
    for (const part of document.querySelectorAll("[data-superuser]")) part.hidden = pb.authStore.isSuperuser !== (part.dataset.superuser === "yes");
  };

  let identity = pb.authStore.record?.id;
  pb.authStore.onChange(() => {
    show();
    if (identity === pb.authStore.record?.id) return; // a renewed token or a changed record
    identity = pb.authStore.record?.id;
    onChange();
  });
  show();

  // the server says whether what is left from last time still counts
  const { record, token } = pb.authStore;
  if (!record) return;
  // not by authRefresh(), which signs in again whoever has signed out meanwhile
  pb.send(`/api/collections/${record.collectionName}/auth-refresh`, { method: "POST", requestKey: null }).catch(({ status, response }) => {
    if ([401, 403, 404].includes(status) && response.status === status && pb.authStore.token === token) pb.authStore.clear();
  });
}
