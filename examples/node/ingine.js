// A producer and a consumer of ingine, written from docs/protocol.md alone. Nothing of ingine is imported.
import { randomUUID } from "node:crypto";
import { readFile } from "node:fs/promises";
import { setTimeout as sleep } from "node:timers/promises";
import { crc32 } from "node:zlib";
import { decode, encode } from "@msgpack/msgpack";
import { ClientClosedError, RESP_TYPES, ReconnectStrategyError, createClient } from "redis";

const [SILENCE_MS, SPACING_MS] = [2000, 50];
const SUBMIT_LUA = new URL("submit.lua", import.meta.url); // a copy of ingine/contract/scripts/submit.lua
const [MAX_JOBS, MAX_JOB_BYTES, MAX_BYTES] = ["100000", "1048576", "1073741824"]; // where the queue has no own
const LARGEST_JOB = "8388608"; // bytes, whatever the queue says
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
 * The events of a job after its first `from` tokens, from its log; the last one is terminal. Anybody can publish on
 * its channel, so a message there is a reason to read the log, and nothing else. `isOurs`: a bare XADD leaves no
 * record until a worker begins the job, so do not doubt it.
 */
export async function* follow(redis, queue, id, { from = 0, isOurs = false } = {}) {
  const [place] = await placeOf(redis, queue, id);
  const [log, record, channel] = ["tokens", "job", "channel"].map((name) => key(place, `${name}:${id}`));
  const bell = new Bell();
  const subscriber = redis.duplicate();
  subscriber.on("error", () => {});
  await subscriber.connect();
  try {
    await subscriber.sSubscribe(channel, () => bell.ring(), true); // resolves when confirmed
    let [position, hasEnded] = [from, false];
    while (true) {
      const entries = await redis.xRange(log, position ? `(${position}-0` : "-", "+");
      const events = checked(id, position, entries);
      for (const event of events) yield event;
      if (events.length && isTerminal(events.at(-1))) return;
      position = events.at(-1)?.position ?? position;
      if (!events.length) {
        // By its record the job had ended before we read its log, and that has no end.
        if (hasEnded) throw new Error(`bad_record: the log of ${id} has nothing behind ${position}`);
        [position, hasEnded] = await checkRecord(redis, record, position, isOurs);
        if (hasEnded) continue;
        await sleep(SPACING_MS); // so that a flood of messages is no flood of reads
      }
      await bell.wait(SILENCE_MS);
    }
  } finally {
    subscriber.destroy();
  }
}

export const isTerminal = (event) => event.type !== "tokens";

/** The events of log entries that follow on `position`. Throws for what no worker writes. */
function checked(id, position, entries) {
  return entries.map((entry, index) => {
    const event = decode(entry.message.event);
    const start = event.position - (isTerminal(event) ? 0 : event.token_ids.length);
    const goesOn = start === position || (index === 0 && start < position && !isTerminal(event));
    const isNamed = String(entry.id) === `${event.position}-${isTerminal(event) ? 1 : 0}`;
    const isOfThisJob = !isTerminal(event) || (event.job_id === id && index === entries.length - 1);
    if (!goesOn || !isNamed || !isOfThisJob) throw new Error(`bad_record: no worker wrote entry ${entry.id} of ${id}`);
    position = event.position;
    return event;
  });
}

/** The log has nothing after `position`: where to look next, and whether the job has ended. Throws if there is none. */
async function checkRecord(redis, record, position, isOurs) {
  const fields = await redis.hmGet(record, ["status", "position"]);
  const [status, committed] = fields.map((field) => field && String(field));
  if (!status && !isOurs) throw new Error("no such job: never submitted, or its result's TTL has passed");
  const hasEnded = Boolean(status) && !["delayed", "queued", "running"].includes(status);
  return [hasEnded ? Math.min(position, Number(committed ?? 0)) : position, hasEnded]; // if we asked for too much
}

/** Rings when something was published. */
class Bell {
  #rung = false;
  #wake = () => {};

  ring() {
    this.#rung = true;
    this.#wake();
  }

  /** Until it has rung since the last time, or `ms` have passed. */
  async wait(ms) {
    if (!this.#rung) {
      await new Promise((resolve) => {
        const timer = setTimeout(resolve, ms);
        this.#wake = () => (clearTimeout(timer), resolve());
      });
    }
    this.#rung = false;
  }
}
