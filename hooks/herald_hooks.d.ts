// Types of what Herald adds to pb_hooks and to JavaScript migrations. Written anew at
// each start of the server. In a file of pb_hooks:
//
//   /// <reference path="../pb_data/herald.d.ts" />

/** A message to the subscribers of a topic. */
interface NotifyMessage {
  topic: string;
  /** Any JSON; the callback of each subscriber gets it unchanged. */
  data: any;
  /** Narrows the subscribers. The parts combine with AND, the items of a list with OR. */
  to?: {
    auth?: "any" | "guest" | "user" | "superuser";
    /** "users:RECORD_ID": all their tabs and devices. */
    users?: string[];
    collections?: string[];
    /** A PocketBase filter on the user's record. */
    filter?: string;
    clients?: string[];
  };
  except?: { users?: string[]; clients?: string[] };
  /** Makes a retry safe: the same id within 5 minutes is sent once. */
  id?: string;
}

/** What became of a message, in connections. */
interface NotifyReport {
  id: string;
  topic: string;
  matched: number;
  queued: number;
  dropped: number;
  /** Where the topic has history. */
  epoch?: string;
  seq?: number;
}

interface NotifyClient {
  id: string;
  /** "users:RECORD_ID"; null for a guest. */
  auth: string | null;
  name: string;
  ip: string;
  connected: string | null;
  subscriptions: string[];
  /** Messages that wait. */
  queued: number;
}

/** A user who is subscribed to a topic whose channel has presence. */
interface NotifyPresenceMember {
  /** "users:RECORD_ID" */
  user: string;
  since: string;
  connections: number;
  /** Those of the user's record that the channel's presenceFields name. */
  fields: { [name: string]: any };
  /** What the user's own clients have set; null if nothing. */
  meta: any;
}

/** Realtime messages. What is wrong is thrown as an Error whose message names the field. */
declare const $notify: {
  send(message: NotifyMessage): NotifyReport;
  /** What is subscribed, by how many connections and users. */
  topics(): { topic: string; subscribers: number; users: number }[];
  /** Who is connected. */
  clients(filter?: { topic?: string; user?: string }): NotifyClient[];
  /** Which users are subscribed to a topic whose channel has presence: the first 1,000. */
  presence(topic: string): {
    epoch: string;
    seq: number;
    total: number;
    guests: number;
    members: NotifyPresenceMember[];
    next: string;
  };
  /** Whether a user ("users:RECORD_ID") has a realtime connection. */
  online(user: string): boolean;
  /** Ends one connection, or all of a user; returns how many there were. */
  disconnect(what: string | { user: string }): number;
};

/** Is called for each message that a client publishes, before it goes out. */
declare function onNotifyPublish(handler: (e: {
  auth: core.Record | null;
  /** The record of the topic's channel. */
  channel: core.Record | null;
  topic: string;
  data: any;
  exceptUsers: string[];
  exceptClients: string[];
  next(): void;
}) => void): void;

/** Is called when users have come to or left a topic whose channel has presence, or show something else. */
declare function onNotifyPresence(handler: (e: {
  topic: string;
  join: NotifyPresenceMember[];
  update: NotifyPresenceMember[];
  /** "users:RECORD_ID" */
  leave: string[];
  total: number;
  guests: number;
  next(): void;
}) => void): void;
