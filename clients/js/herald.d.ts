// Types of herald.js. It works with PocketBase's JavaScript SDK 0.21 and newer, which
// brings its own types.
import type PocketBase from "pocketbase";

/** A message with what is known of it. */
export interface Message<T = any> {
  id: string;
  topic: string;
  /** Names the history that seq belongs to; empty where the topic has none. */
  epoch: string;
  /** The message's number in its topic, from 1. */
  seq: number;
  /** When it was sent, in UTC: "2026-11-24 15:23:34.441Z". */
  time: string;
  /** Who published it, "users:ID"; null: a guest or the server. */
  from: string | null;
  data: T;
  /** It was fetched, since the connection was not there when it was sent. */
  replayed: boolean;
  /** To be given back as `since`, to go on behind this message; empty where the topic
   * has no history. */
  position: string;
}

/** Messages were missed that the server does not keep any more. */
export interface Gap {
  topic: string;
  /** The position from which on they are missing; empty where it is not known. */
  since: string;
  /** The history there is now; another one than that of `since` if it was lost, empty
   * if the topic has none. */
  epoch: string;
  /** The number of the next message that follows; null: none yet. */
  first: number | null;
  /** The topic's last number. */
  head: number;
}

/**
 * - connecting: there is no connection; the SDK tries
 * - recovering: what was missed is being fetched
 * - live: all that was sent is delivered, and what is sent arrives
 * - denied: the server does not let this user listen; it is tried again when somebody signs in
 * - closed: unsubscribed
 */
export type State = "connecting" | "recovering" | "live" | "denied" | "closed";

export interface Options {
  /** Go on behind this position. Without since and rewind it begins now. */
  since?: string | null;
  /** Begin with the last messages: a number, or a duration such as "2m". */
  rewind?: number | string;
  onGap?: (gap: Gap) => void;
  /** Is told of each change, with the position at that moment. */
  onState?: (state: State, position: string) => void;
}

/**
 * Subscribes to a topic. Where its channel has history, each message reaches callback
 * once and in order, over reconnects, restarts of the server and sign-ins.
 *
 * Rejects with status 403 where the topic is denied, with 400 where the topic or `since`
 * is wrong, and as the SDK does where no server answers after a few tries. Returns a
 * function that unsubscribes, and never rejects. `pb.realtime.unsubscribe(topic)` and
 * `pb.realtime.unsubscribe()` end the subscription, too.
 */
export function subscribe<T = any>(
  pb: PocketBase,
  topic: string,
  callback: (message: Message<T>) => void,
  options?: Options,
): Promise<() => Promise<void>>;

/** A user who is present on a topic. */
export interface Member<M = any> {
  /** "users:ID" */
  user: string;
  /** When the first of their connections came, in UTC. */
  since: string;
  /** How many connections they have: tabs and devices. */
  connections: number;
  /** The fields of their record that the channel's presenceFields name. */
  fields: Record<string, any>;
  /** What their own clients have set; null if nothing. */
  meta: M | null;
}

/** Who is present on a topic, by "users:ID". It changes by itself. */
export interface Presence<M = any> extends ReadonlyMap<string, Member<M>> {
  /** The number of users. It may be larger than size: above the channel's presenceLimit only the number is known. */
  readonly total: number;
  /** The number of connections of guests. */
  readonly guests: number;
  /**
   * Shows meta, any JSON of at most 1 KiB, beside this user; null removes it. Of several calls in a row the last one counts.
   * It stays as long as one of the user's connections does, through a reload, too. It does nothing for guests, who are only
   * counted, and after leave().
   */
  set(meta: M | null): Promise<void>;
  /** Takes this user out of the list, for all; they go on listening. It holds through reconnects. */
  hide(): Promise<void>;
  /** Undoes hide. */
  show(): Promise<void>;
  /** Leaves, and watches no more. */
  leave(): Promise<void>;
}

export interface PresenceOptions<M = any> {
  /** What to show beside this user from the beginning. Without it, what another tab or the page before a reload has set stays. */
  meta?: M | null;
  /** false: begin as after hide(). Nobody sees this user before show(). */
  visible?: boolean;
  /** false: only watch, do not subscribe to the topic. */
  join?: boolean;
  /** Called after each change, and first for all members that were there when presence() returned. */
  onChange?: (change: { join: Member<M>[]; update: Member<M>[]; leave: string[] }) => void;
  onCount?: (count: { total: number; guests: number }) => void;
  /** Says whether the members are right ("live"), or may be out of date until the connection is back. "denied": they may not be seen; it is tried again on the next connection, and when somebody signs in. */
  onState?: (state: "connecting" | "live" | "denied" | "closed") => void;
}

/**
 * Subscribes to a topic whose channel has presence, and tells who else is there. Resolves when
 * the members are known (after 10 seconds in any case). Survives reconnects and restarts of the
 * server: the members that are known stay until the new ones have come, and after a restart for
 * 10 seconds more, in which they come back. Rejects with status 403 where the topic, or to watch
 * it, is denied; with `join: false` only the latter counts.
 */
export function presence<M = any>(pb: PocketBase, topic: string, options?: PresenceOptions<M>): Promise<Presence<M>>;

/**
 * Lets all tabs of a user share one realtime connection: browsers allow six to a host over HTTP/1.1, and the seventh
 * tab does not load. Call it once for each SDK client, before anything is subscribed. One tab has the
 * connection, and passes on what comes. When that tab is closed, another one connects in its place, and all catch up as after
 * any lost connection: on topics with history nothing is lost. Tabs share if they have the same user and the SDK's own
 * LocalAuthStore; others keep their own connection. Presence sees one connection for all tabs, and so does what leaves
 * out the sender's connection (`self: false`).
 *
 * Returns false, and changes nothing, where the browser has no Web Locks (they need https or localhost) or no
 * BroadcastChannel, or the SDK is unknown.
 */
export function shareConnection(pb: PocketBase): boolean;
