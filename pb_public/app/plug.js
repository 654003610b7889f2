// A plug to pull: cuts the page's realtime connections for a while, as a lost network
// does, to watch what is recovered afterwards.

const open = new Set();
let isCut = false;

class PluggedEventSource extends EventSource {
  constructor(...args) {
    super(...args);
    open.add(this);
    if (isCut) setTimeout(() => this.fail()); // when the SDK has set its onerror
  }

  close() {
    open.delete(this);
    super.close();
  }

  fail() {
    if (!open.has(this)) return;
    this.close();
    this.onerror?.(new Event("error"));
  }
}

/** Makes the SDK's connections ones that can be cut. To be called before they are made. */
export function installPlug() {
  globalThis.EventSource = PluggedEventSource;
}

/** Cuts all connections, and those that are tried meanwhile, for some seconds; tick is
 * called with those that are left, at last with 0. */
export function pullPlug(seconds, tick) {
  isCut = seconds > 0;
  tick(seconds);
  if (!isCut) return;
  for (const source of [...open]) source.fail();
  setTimeout(() => pullPlug(seconds - 1, tick), 1000);
}
