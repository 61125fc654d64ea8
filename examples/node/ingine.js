// A producer and a consumer of ingine, written only from docs/protocol.md. No code of ingine is imported.
import { randomUUID } from "node:crypto";
import { readFile } from "node:fs/promises";
import { setTimeout as sleep } from "node:timers/promises";
import { crc32 } from "node:zlib";
import { decode, encode } from "@msgpack/msgpack";
import { ClientClosedError, RESP_TYPES, ReconnectStrategyError, createClient } from "redis";

const [SILENCE_MS, SPACING_MS] = [2000, 50];
const SUBMIT_LUA = new URL("submit.lua", import.meta.url); // a copy of ingine/contract/scripts/submit.lua
const [MAX_JOBS, MAX_JOB_BYTES, MAX_BYTES] = ["100000", "1048576", "1073741824"]; // defaults of the queue
const LARGEST_JOB = "8388608"; // bytes, whatever the queue's limit is
const [BYTES_PER_TOKEN, EXPECTED_TOKENS, MAX_COST] = [4, 256, 1048576]; // estimates, for fair shares

/** Connect a client whose bulk replies are Buffers, since events are msgpack. It gives up after about 3 s. */
export async function connect(url) {
  const reconnectStrategy = (retries, cause) => (retries < 10 ? 300 : new Error(`${url}: ${cause.message}`));
  const client = createClient({ url, socket: { reconnectStrategy, connectTimeout: 3000 } });
  client.on("error", () => {}); // the client reconnects, and events that it has missed are in the log
  await client.connect();
  return client.withTypeMapping({ [RESP_TYPES.BLOB_STRING]: Buffer });
}

export const isUnavailable = (error) => error instanceof ReconnectStrategyError || error instanceof ClientClosedError;

const key = (place, name) => `ingine:{${place}}:${name}`;

/** Return the queue or the partition that a job belongs to, and the number of partitions. */
async function partitionOf(redis, queue, id) {
  const partitions = Number((await redis.hGet(key(queue, "queue"), "partitions")) ?? 1);
  return [partitions > 1 ? `${queue}.${crc32(id) % partitions}` : queue, partitions];
}

/** Submit with one XADD, which is all that the protocol requires. `job` is a map as in docs/protocol.md. */
export async function submit(redis, queue, job, priority = "normal") {
  const id = job.id ?? randomUUID();
  const [place] = await partitionOf(redis, queue, id);
  const numChoices = job.sampling?.n ?? 1;
  const fields = { job: packed({ v: 1, id, ...job }), ...(numChoices > 1 && { choices: String(numChoices) }) };
  await redis.xAdd(key(place, `jobs:${priority}`), "*", fields);
  return id;
}

/** Submit through submit.lua, which refuses a duplicate id or a full queue and creates the job's record at once. */
export async function submitChecked(redis, queue, job, priority = "normal") {
  const id = job.id ?? randomUUID();
  const [place, partitions] = await partitionOf(redis, queue, id);
  const names = [`job:${id}`, "queue", ...[priority, "high", "normal", "low"].map((name) => `jobs:${name}`)];
  names.push("delayed", "bytes", `rate:${job.tenant ?? ""}`, "deadlines", "idem:");
  const [verdict, detail] = await redis.eval(await readFile(SUBMIT_LUA, "utf8"), {
    keys: names.map((name) => key(place, name)),
    arguments: [
      id,
      packed({ v: 1, id, ...job }),
      priority,
      randomUUID(), // the nonce makes it harmless to send this submission twice
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
      "", // no earlier job, which only an idempotency key can have
      String(job.sampling?.n ?? 1),
    ],
  });
  if (String(verdict) !== "accepted") throw new Error(`job ${id} was not accepted: ${verdict} ${detail}`);
  return id;
}

/** Estimate a job's tokens: its prompt once, and the output of each choice. */
const costOf = ({ prompt = "", sampling: { n = 1, max_tokens = EXPECTED_TOKENS } = {} }) =>
  Math.min(Math.floor(Buffer.byteLength(prompt) / BYTES_PER_TOKEN) + n * max_tokens, n * MAX_COST);

const packed = (value) => Buffer.from(encode(value));

/**
 * Yield the events of a job after its first `from` tokens, read from its log; the last one is terminal. A message on
 * the channel may be forged, so it only causes a read of the log. `isOurs`: this process has submitted the job. After
 * a bare XADD a job has no record until a worker begins it, so a missing record is then no error.
 */
export async function* follow(redis, queue, id, { from = 0, isOurs = false } = {}) {
  const [place] = await partitionOf(redis, queue, id);
  const [log, record, channel] = ["tokens", "job", "channel"].map((name) => key(place, `${name}:${id}`));
  const wakeup = new Wakeup();
  const subscriber = redis.duplicate();
  subscriber.on("error", () => {});
  await subscriber.connect();
  try {
    await subscriber.sSubscribe(channel, () => wakeup.set(), true); // resolves when confirmed
    let [position, hasEnded] = [from, false];
    while (true) {
      const entries = await redis.xRange(log, position ? `(${position}-0` : "-", "+");
      const events = checked(id, position, entries);
      for (const event of events) yield event;
      if (events.length && isTerminal(events.at(-1))) return;
      position = events.at(-1)?.position ?? position;
      if (!events.length) {
        // The record said that the job had ended before we read the log, and the log has no terminal event.
        if (hasEnded) throw new Error(`bad_record: the log of ${id} has nothing after ${position}`);
        [position, hasEnded] = await checkRecord(redis, record, position, isOurs);
        if (hasEnded) continue;
        await sleep(SPACING_MS); // a flood of messages must not cause a flood of reads
      }
      await wakeup.wait(SILENCE_MS);
    }
  } finally {
    subscriber.destroy();
  }
}

export const isTerminal = (event) => event.type !== "tokens";

/** Decode the log entries after `position`. Throws if they are not what a worker writes. */
function checked(id, position, entries) {
  return entries.map((entry, index) => {
    const event = decode(entry.message.event);
    const start = event.position - (isTerminal(event) ? 0 : event.token_ids.length);
    const continues = start === position || (index === 0 && start < position && !isTerminal(event));
    const hasItsId = String(entry.id) === `${event.position}-${isTerminal(event) ? 1 : 0}`;
    const isOfThisJob = !isTerminal(event) || (event.job_id === id && index === entries.length - 1);
    if (!continues || !hasItsId || !isOfThisJob) {
      throw new Error(`bad_record: no worker wrote entry ${entry.id} of ${id}`);
    }
    position = event.position;
    return event;
  });
}

/**
 * Read the job's record after a read of the log without entries. Returns the position to read from next, and whether
 * the job has ended. Throws if there is no such job.
 */
async function checkRecord(redis, record, position, isOurs) {
  const fields = await redis.hmGet(record, ["status", "position"]);
  const [status, committed] = fields.map((field) => field && String(field));
  if (!status && !isOurs) throw new Error("no such job: never submitted, or its result's TTL has passed");
  const hasEnded = Boolean(status) && !["delayed", "queued", "running"].includes(status);
  return [hasEnded ? Math.min(position, Number(committed ?? 0)) : position, hasEnded]; // `from` may be beyond the end
}

/** Wakes a waiting reader when a message was published. */
class Wakeup {
  #isSet = false;
  #wake = () => {};

  set() {
    this.#isSet = true;
    this.#wake();
  }

  /** Wait until `set` has been called since the last wait, or `ms` have passed. */
  async wait(ms) {
    if (!this.#isSet) {
      await new Promise((resolve) => {
        const timer = setTimeout(resolve, ms);
        this.#wake = () => (clearTimeout(timer), resolve());
      });
    }
    this.#isSet = false;
  }
}
