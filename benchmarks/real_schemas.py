"""Tries folders of real-world JSON schemas: which are accepted and why others are not, and whether what is
generated for them validates: `python benchmarks/real_schemas.py FOLDER ... --per-folder 50 --json FILE`.

A file is a schema, or an object with one as `schema`. Each is compiled, and walked through at random, in a
process of its own with the bounds that a worker sets. With --model the packaged model then answers for each
schema that is accepted, at temperature 0 and 1. A line of JSON for each schema and for each answer is written
as it comes; whatever does not validate is printed, and the exit status is 1 then.
"""

import argparse
import json
import os
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from benchmarks.schema_walks import Verdicts, Walker, packaged_compiler
from ingine.engine.store.model_store import DEFAULT_MODEL, resolve_model
from ingine.errors import InvalidRequest
from ingine.structured_outputs import StructuredOutputsParams

CPU_S, CPU_S_PER_BYTE, MEMORY = 2.0, 20e-6, 1 << 30
"""The bounds of a worker's prompt process, see `worker/grammar_checks.py`."""
CLOSE_AFTER = (10, 100, 300)
"""Tokens after which walks take what closes, in turns."""
MAX_WALK_TOKENS = 2000
MAX_WALKS_CPU_S = 120
PROMPT = "The JSON schema {schema}\n\nA short JSON document that matches it:\n"
MAX_SCHEMA_CHARS = 300
"""Of the schema, in the prompt."""
CHUNK = 64


def files_of(folders: list[Path], per_folder: int | None) -> list[Path]:
    """A sample of each folder, which depends on the names alone."""
    found = []
    for folder in folders:
        files = sorted(folder.glob("**/*.json"))
        if per_folder is not None and per_folder < len(files):
            files = random.Random(0).sample(files, per_folder)
        found += files
    return found


def read_schema(path: Path) -> dict | None:
    content = json.loads(path.read_text(encoding="utf-8-sig"))
    if isinstance(content, dict) and isinstance(content.get("schema"), dict) and "tests" in content:
        content = content["schema"]
    return content if isinstance(content, dict) else None


def as_text(schema: dict) -> str:
    return json.dumps(schema, ensure_ascii=False, separators=(",", ":"))


def try_schema(walker: Walker, schema: dict, num_walks: int) -> dict:
    began = time.process_time()
    try:
        params = StructuredOutputsParams(json=as_text(schema))
        walker.compiler.compile(params)
    except InvalidRequest as error:
        return {"status": str(error.code), "reason": str(error)}
    except ValueError:
        return {"status": "invalid_parameter", "reason": "more than 128 KiB"}
    cpu_s = time.process_time() - began
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_WALKS_CPU_S, MAX_WALKS_CPU_S))
    verdict_of = Verdicts(schema)
    verdicts = []
    for seed in range(num_walks):
        try:
            text = walker.walk(
                walker.state(params),
                random.Random(seed),
                close_after=CLOSE_AFTER[seed % len(CLOSE_AFTER)],
                max_tokens=MAX_WALK_TOKENS,
            )
        except AssertionError as error:
            verdicts.append(f"no token: {error}")
            continue
        verdicts.append("open" if text is None else verdict_of(text) + _shown(text))
    return {
        "status": "accepted",
        "cpu_ms": round(cpu_s * 1e3, 2),
        "schema_error": verdict_of.schema_error,
        "walks": [one.partition("\n")[0] if one.startswith("valid") else one for one in verdicts],
    }


def _shown(text: bytes) -> str:
    return f"\n{text.decode(errors='replace'):.500}"


def in_child(walker: Walker, path: Path, num_walks: int) -> dict:
    """What `try_schema` returns, in a forked process with a worker's bounds."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        result = {"status": "died", "reason": "an exception"}
        try:
            schema = read_schema(path)
            if schema is not None:
                limit = int(CPU_S + CPU_S_PER_BYTE * path.stat().st_size) + 1
                resource.setrlimit(resource.RLIMIT_CPU, (limit, MAX_WALKS_CPU_S))
                resource.setrlimit(resource.RLIMIT_AS, (_address_space() + MEMORY,) * 2)
                result = try_schema(walker, schema, num_walks)
            else:
                result = {"status": "no schema"}
        except BaseException as error:  # a panic among them
            result["reason"] = f"{error!r:.300}"
        finally:
            os.write(writer, json.dumps(result).encode()[:60_000])
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if status or not answer:
        return {
            "status": "grammar_too_costly",
            "reason": f"the process died of {os.waitstatus_to_exitcode(status)}",
        }
    return json.loads(answer)


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def answers(walker: Walker, schemas: dict[str, dict], max_tokens: int, deadline: float) -> Iterator[dict]:
    """The model's answers for each schema at temperature 0 and 1, while there is time."""
    from ingine.engine.llm import LLM  # torch
    from ingine.sampling_params import SamplingParams

    llm = LLM(DEFAULT_MODEL, max_model_len=1024, max_num_seqs=CHUNK, kv_cache_bytes="1GiB")
    asked = [(name, temperature) for name in schemas for temperature in (0.0, 1.0)]
    for start in range(0, len(asked), CHUNK):
        if time.monotonic() > deadline:
            return
        chunk = asked[start : start + CHUNK]
        params = [
            SamplingParams(
                temperature=temperature,
                seed=7,
                max_tokens=max_tokens,
                structured_outputs={"json": as_text(schemas[name])},
            )
            for name, temperature in chunk
        ]
        prompts = [PROMPT.format(schema=as_text(schemas[name])[:MAX_SCHEMA_CHARS]) for name, _ in chunk]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        for (name, temperature), each, output in zip(chunk, params, outputs, strict=True):
            choice = output.outputs[0]
            verdict = str(choice.finish_reason)
            if verdict == "stop":
                verdict = Verdicts(schemas[name])(choice.text.encode()) + _shown(choice.text.encode())
            elif verdict == "length":
                state = walker.state(each.structured_outputs)
                verdict = "cut" if state.accept(choice.token_ids) else f"no prefix: {state.error}"
            else:
                verdict += f": {choice.stop_reason}"
            yield {
                "answer": name,
                "temperature": temperature,
                "num_tokens": len(choice.token_ids),
                "verdict": verdict.partition("\n")[0] if verdict.startswith("valid") else verdict,
            }


class Report:
    """Counts, and what is wrong."""

    def __init__(self, path: Path | None):
        self._file = None if path is None else path.open("w")
        self.verdicts: dict[str, Counter] = {}
        self.num_wrong = 0

    def write(self, **line) -> None:
        if self._file is not None:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def count(self, what: str, name: str, verdict: str) -> None:
        kind = verdict.partition(":")[0]
        self.verdicts.setdefault(what, Counter())[kind] += 1
        if kind not in ("valid", "open", "cut", "format", "undecided"):
            self.num_wrong += 1
            print(f"WRONG: {name}, {what}: {verdict}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--per-folder", type=int, help="a sample of so many files of each folder")
    parser.add_argument("--walks", type=int, default=6)
    parser.add_argument("--model", action="store_true")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--minutes", type=float, default=25, help="for the model")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report = Report(options.json)
    walker = Walker(packaged_compiler(resolve_model(DEFAULT_MODEL)))
    results: dict[str, dict] = {}
    for path in files_of(options.folders, options.per_folder):
        result = in_child(walker, path, options.walks)
        if result["status"] == "no schema":
            continue
        results[str(path)] = result
        report.write(schema=str(path), **result)
        for verdict in result.get("walks", ()):
            report.count("walks", str(path), verdict)
    _print_schemas(results)
    if options.model:
        accepted = [path for path, result in results.items() if result["status"] == "accepted"]
        schemas = {path: read_schema(Path(path)) for path in accepted}
        deadline = time.monotonic() + 60 * options.minutes
        for answer in answers(walker, schemas, options.max_tokens, deadline):
            report.write(**answer)
            report.count(f"temperature {answer['temperature']}", answer["answer"], answer["verdict"])
    for what, counts in report.verdicts.items():
        print(f"{what}: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common()))
    sys.exit(report.num_wrong > 0)


def _print_schemas(results: dict[str, dict]) -> None:
    print(f"{len(results)} schemas\n\n| | schemas | share |\n| --- | --- | --- |")
    for status, count in Counter(result["status"] for result in results.values()).most_common():
        print(f"| {status} | {count} | {count / len(results):.1%} |")
    reasons = Counter(
        result["reason"].partition("json: ")[2][:70] or result["reason"]
        for result in results.values()
        if result.get("reason")
    )
    print("\n| refused for | schemas |\n| --- | --- |")
    for reason, count in reasons.most_common(25):
        print(f"| {reason} | {count} |")
    times = sorted(result["cpu_ms"] for result in results.values() if "cpu_ms" in result)
    if times:
        print(
            f"\ncompiled in {median(times):.1f} ms in the median, {times[int(len(times) * 0.95)]:.0f} at the "
            f"95th percentile, {times[-1]:.0f} at most (processor time)\n",
            flush=True,
        )


if __name__ == "__main__":
    main()
