// A producer and a consumer of ingine, written from docs/protocol.md alone. Nothing of ingine is imported.
import { randomUUID } from "node:crypto";
import { readFile } from "node:fs/promises";
import { crc32 } from "node:zlib";
import { decode, encode } from "@msgpack/msgpack";
import { ClientClosedError, RESP_TYPES, ReconnectStrategyError, createClient } from "redis";

const SILENCE_MS = 2000;
const SUBMIT_LUA = new URL("submit.lua", import.meta.url); // a copy of producer/scripts/submit.lua
const [MAX_JOBS, MAX_JOB_BYTES, MAX_BYTES] = ["100000", "1048576", "1073741824"]; // where the queue has no own
const LARGEST_JOB = "67108864"; // bytes, whatever the queue says
const [BYTES_PER_TOKEN, EXPECTED_TOKENS, MAX_COST] = [4, 256, 1048576]; // about; for fair shares

/** A client whose bulk replies are Buffers, since jobs and events are msgpack. It gives up after about 3 s. */
export async function connect(url) {
  const reconnectStrategy = (retries, cause) => (retries < 10 ? 300 : new Error(`${url}: ${cause.message}`));
  const client = createClient({ url, socket: { reconnectStrategy, connectTimeout: 3000 } });
  client.on("error", () => {}); // a lost connection is made again; what was missed is in the log
  await client.connect();
  return client.withTypeMapping({ [RESP_TYPES.BLOB_STRING]: Buffer });
}

export const isUnavailable = (error) => error instanceof ReconnectStrategyError || error instanceof ClientClosedError;

const key = (place, name) => `ingine:{${place}}:${name}`;

/** Where a job lives: in the queue, or in one of its partitions. How many there are, too. */
async function placeOf(redis, queue, id) {
  const partitions = Number((await redis.hGet(key(queue, "queue"), "partitions")) ?? 1);
  return [partitions > 1 ? `${queue}.${crc32(id) % partitions}` : queue, partitions];
}

/** Submit with one XADD: all that the protocol asks for. `job` is a map as in docs/protocol.md. */
export async function submit(redis, queue, job, priority = "normal") {
  const id = job.id ?? randomUUID();
  const [place] = await placeOf(redis, queue, id);
  await redis.xAdd(key(place, `jobs:${priority}`), "*", { job: packed({ v: 1, id, ...job }) });
  return id;
}

/** Submit through submit.lua: refuses a duplicate id and a full queue, and the job has a record at once. */
export async function submitChecked(redis, queue, job, priority = "normal") {
  const id = job.id ?? randomUUID();
  const [place, partitions] = await placeOf(redis, queue, id);
  const names = [`job:${id}`, "queue", ...[priority, "high", "normal", "low"].map((name) => `jobs:${name}`)];
  names.push("delayed", "bytes", `rate:${job.tenant ?? ""}`, "deadlines", "idem:");
  const [verdict, detail] = await redis.eval(await readFile(SUBMIT_LUA, "utf8"), {
    keys: names.map((name) => key(place, name)),
    arguments: [
      id,
      packed({ v: 1, id, ...job }),
      priority,
      randomUUID(), // makes a second sending of this very submission harmless
      job.reply_to ?? "",
      "", // no idempotency key
      MAX_JOBS,
      MAX_JOB_BYTES,
      MAX_BYTES,
      String(partitions),
      job.tenant ?? "",
      String(costOf(job)),
      String(job.not_before_ms ?? 0),
      LARGEST_JOB,
      String(job.deadline_ms ?? 0),
      "", // no job to ask for: that goes with an idempotency key
    ],
  });
  if (String(verdict) !== "accepted") throw new Error(`job ${id} was not accepted: ${verdict} ${detail}`);
  return id;
}

const costOf = ({ prompt = "", sampling }) =>
  Math.min(Math.floor(Buffer.byteLength(prompt) / BYTES_PER_TOKEN) + (sampling?.max_tokens ?? EXPECTED_TOKENS), MAX_COST);

const packed = (value) => Buffer.from(encode(value));

/**
 * The events of a job after its first `from` tokens: past ones from the log, new ones from the channel. The last
 * one is terminal. `isOurs`: a bare XADD leaves no record until a worker begins the job, so do not doubt it.
 */
export async function* follow(redis, queue, id, { from = 0, isOurs = false } = {}) {
  const [place] = await placeOf(redis, queue, id);
  const [log, record, channel] = ["tokens", "job", "channel"].map((name) => key(place, `${name}:${id}`));
  const live = new Inbox();
  const subscriber = redis.duplicate();
  subscriber.on("error", () => {});
  await subscriber.connect();
  try {
    await subscriber.sSubscribe(channel, (bytes) => live.push(bytes), true); // resolves when confirmed
    let position = from;
    while (true) {
      const logged = await redis.xRange(log, position ? `(${position}-0` : "-", "+");
      for (const event of logged.map((entry) => decode(entry.message.event))) {
        yield event;
        if (isTerminal(event)) return;
        position = event.position;
      }
      if (!logged.length) position = await checkRecord(redis, record, position, isOurs);
      // The fast lane, as long as it has no hole: a jump or silence lead back to the log.
      for (let event; (event = await live.next(SILENCE_MS)) && startOf(event) <= position; ) {
        if (event.position <= position && !isTerminal(event)) continue; // the log had it already
        yield event;
        if (isTerminal(event)) return;
        position = event.position;
      }
    }
  } finally {
    subscriber.destroy();
  }
}

export const isTerminal = (event) => event.type !== "tokens";

const startOf = (event) => event.position - (event.token_ids?.length ?? 0);

/** The log has nothing after `position`: where to look next. Throws if there is no such job. */
async function checkRecord(redis, record, position, isOurs) {
  const fields = await redis.hmGet(record, ["status", "position"]);
  const [status, committed] = fields.map((field) => field && String(field));
  if (!status && !isOurs) throw new Error("no such job: never submitted, or its result's TTL has passed");
  const hasEnded = status && !["delayed", "queued", "running"].includes(status);
  return hasEnded ? Math.min(position, Number(committed)) : position; // if we asked for more than there is
}

/** What came from the channel and was not read yet. */
class Inbox {
  #messages = [];
  #wake = () => {};

  push(bytes) {
    this.#messages.push(bytes);
    this.#wake();
  }

  /** The next event, or undefined after `ms` of silence. */
  async next(ms) {
    if (!this.#messages.length) {
      await new Promise((resolve) => {
        const timer = setTimeout(resolve, ms);
        this.#wake = () => (clearTimeout(timer), resolve());
      });
    }
    const bytes = this.#messages.shift();
    return bytes && decode(bytes);
  }
}
