// Small helpers over the DOM. Text from outside gets into the page as text
// only: nothing here takes HTML.

/** Where the server is: the page may be below a path of its host. */
export const server = new URL("..", import.meta.url).href.replace(/\/$/, "");

/** The element with the id. */
export const byId = (id) => document.getElementById(id);

/** A new element with properties and children (elements or text). */
export function element(name, properties = {}, ...children) {
  const result = Object.assign(document.createElement(name), properties);
  result.append(...children);
  return result;
}

/** Shows text in an element that is hidden while it has none. */
export function setText(target, text) {
  target.textContent = text;
  target.hidden = !text;
}

/** The time of day of a date, as the reader writes it. */
export const timeOf = (date) => date.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit" });

/** What an error of the SDK tells, the fields at fault included. */
export function describe(error) {
  const fields = Object.entries(fieldErrors(error)).map(([field, message]) => `${field}: ${message}`);
  const message = error?.response?.message || (error?.status === 0 ? "The server cannot be reached." : error?.message) || String(error);
  return fields.length ? fields.join(" ") : message;
}

/** The messages of an SDK error by field path, e.g. {"to.filter": "…"}. */
export function fieldErrors(error) {
  const result = {};
  const walk = (value, path) => {
    if (typeof value?.message === "string" && typeof value?.code === "string") {
      result[path.join(".")] = value.message;
    } else if (value && typeof value === "object") {
      for (const [name, inner] of Object.entries(value)) walk(inner, [...path, name]);
    }
  };
  walk(error?.response?.data, []);
  return result;
}
