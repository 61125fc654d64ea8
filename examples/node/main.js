// node main.js submit [--checked] [--queue Q] [--max-tokens N] [--temperature T] PROMPT
// node main.js stream [--queue Q] [--from N] JOB_ID
//
// Prints the job's text to standard output as it arrives, everything else to standard error. Reads $INGINE_REDIS_URL
// and $INGINE_QUEUE like the `ingine` command, and has its exit status: 0 finished; 1 failed, cancelled, expired,
// refused or unknown; 2 wrong usage; 3 server unavailable.
import { parseArgs } from "node:util";
import { connect, follow, isTerminal, isUnavailable, submit, submitChecked } from "./ingine.js";

const OPTIONS = {
  checked: { type: "boolean", default: false }, // submit through submit.lua
  queue: { type: "string", default: process.env.INGINE_QUEUE ?? "default" },
  from: { type: "string", default: "0" },
  "max-tokens": { type: "string", default: "64" },
  temperature: { type: "string", default: "0" },
};

class Usage extends Error {}

async function main({ queue, checked, ...options }, [command, argument, ...rest]) {
  if (!["submit", "stream"].includes(command) || argument === undefined || rest.length) {
    throw new Usage("node main.js submit PROMPT, or node main.js stream JOB_ID");
  }
  const [from, max_tokens, temperature] = ["from", "max-tokens", "temperature"].map((name) => number(options, name));
  const redis = await connect(process.env.INGINE_REDIS_URL ?? "redis://127.0.0.1:6379/0");
  try {
    if (command === "stream") return await print(follow(redis, queue, argument, { from }));
    const job = { prompt: argument, sampling: { max_tokens, temperature } };
    const id = await (checked ? submitChecked : submit)(redis, queue, job);
    console.error(`job ${id}`);
    return await print(follow(redis, queue, id, { isOurs: true }));
  } finally {
    redis.destroy();
  }
}

function number(options, name) {
  const value = Number(options[name]);
  if (Number.isNaN(value)) throw new Usage(`--${name} is a number, not ${options[name]}`);
  return value;
}

/** Write the text as it arrives. Returns the exit status. */
async function print(events) {
  for await (const event of events) {
    process.stdout.write(event.text ?? ""); // empty fields are left out of a terminal event
    if (isTerminal(event)) {
      process.stdout.write("\n");
      const reason = event.error ? `: ${event.error.code}: ${event.error.message}` : "";
      console.error(`${event.type} after ${event.position} tokens${reason}`);
      return event.type === "finished" ? 0 : 1;
    }
  }
}

function exitStatus(error) {
  if (error instanceof Usage || error.code?.startsWith("ERR_PARSE_ARGS")) return 2;
  return isUnavailable(error) ? 3 : 1;
}

try {
  const { values, positionals } = parseArgs({ options: OPTIONS, allowPositionals: true });
  process.exitCode = await main(values, positionals);
} catch (error) {
  console.error(error.message);
  process.exitCode = exitStatus(error);
}
