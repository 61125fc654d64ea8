"""Ranks as torchrun starts them, but forked out of one program that has imported everything.

`python -m tests.engine.parallel_ranks FOLDER` puts what each rank found into FOLDER, for test_parallel.py to
look at. The models are in FOLDER/models.
"""

import json
import os
import random
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch.utils._python_dispatch import _disable_current_modes

from ingine.engine import build
from ingine.engine.communication.parallel import TensorParallel
from ingine.engine.config import EngineConfig
from ingine.engine.engine import Engine
from ingine.engine.kernels.sampling import cuda as device_sampling
from ingine.engine.kernels.select import REFERENCE, Kernels
from ingine.engine.models.loader import load_model
from ingine.engine.request import EngineRequest
from ingine.engine.text.tokenizer import Tokenizer
from ingine.sampling_params import SamplingParams
from tests.engine import tape
from tests.engine.packed import PackedModel, PagedSequence
from tests.paths import HAS_TRITON
from tests.tiny_models import make_tokenizer
from tests.waiting import wait_until

SIZE = 2
CPU = torch.device("cpu")
PROMPT = list(range(40, 77))
NUM_TOKENS = 12
ENGINES = {
    "llama": {"max_num_seqs": 8, "max_num_batched_tokens": 512},
    "llama-tied": {"max_num_seqs": 8, "async_scheduling": True},
    "qwen2": {"max_num_seqs": 5, "max_num_batched_tokens": 13, "async_scheduling": True},
    "qwen3": {"max_num_seqs": 8, "num_blocks": 18},
}
"""Options by model: everything at once, scheduled ahead, prefill in odd chunks, and too little memory for
all."""
Request = tuple[list[int], SamplingParams]
LONGEST_LIFE_S = 900
"""Lifetime of a rank whose parent program has failed to end it."""
REGEX = "[abc]{3,6}-(foo|bar)+[0-9]{2}"
ONLY_CHOICE = "a long answer that is forced"
MESSAGES = ["small", {"positions": np.arange(7), "more": [1, None, "x"]}, np.arange(50_000)]
"""The last one is longer than one broadcast."""


def main(folder: Path) -> None:
    ended = [end_of(pid) for pid in fork_ranks(folder, compute)]
    (folder / "computed.json").write_text(json.dumps(ended))
    kill_rank_0(folder)
    kill_a_follower(folder)
    fail_a_step(folder)
    lose_a_step_before_sampling(folder)


# --------------------------------------------------------------------------------------------- what ranks do


def compute(folder: Path, parallel: TensorParallel) -> None:
    """Collectives, then every model's logits. What came of it is saved by each rank."""
    found = {
        "collectives": collectives(parallel),
        "messages": messages(parallel),
        "logits": {},
        "engines": {},
    }
    for path in sorted((folder / "models").iterdir()):
        found["logits"][path.name] = greedy_logits(path, parallel)
    for name, options in ENGINES.items():
        found["engines"][name] = generate(folder / "models" / name, parallel, requests(), **options)
    found["constrained"] = {
        is_async: generate_constrained(folder / "models" / "llama", parallel, async_scheduling=is_async)
        for is_async in (False, True)
    }
    found["replayed"] = generate_replayed(folder / "models" / "llama", parallel)
    torch.save(found, folder / f"rank-{parallel.rank}.pt")
    parallel.close()


def collectives(parallel: TensorParallel) -> dict:
    rank = parallel.rank
    own = torch.tensor([[1.0, 2.0], [3.0, 4.0]]) + 10 * rank
    return {
        "all_reduce": parallel.all_reduce(own.clone()),
        "all_reduce bfloat16": parallel.all_reduce(own.bfloat16()),
        "all_gather": parallel.all_gather(own, 4),
        "all_gather, cut": parallel.all_gather(own, 3),
        "broadcast": parallel.broadcast(torch.tensor([5, 6]) + rank),
        "agree_on_min": parallel.agree_on_min(7 - rank),
    }


def messages(parallel: TensorParallel) -> list:
    """The messages that rank 0 sent, or the others received."""
    if parallel.rank == 0:
        for message in MESSAGES:
            parallel.send(message)
        return MESSAGES
    return [parallel.receive() for _ in MESSAGES]


def greedy_logits(path: Path, parallel: TensorParallel) -> torch.Tensor:
    """[len(PROMPT) + NUM_TOKENS, vocab_size]: of a prompt in two chunks, then of one greedy token a step."""
    decoder = load_model(path, dtype=torch.float32, device=CPU, kernels=REFERENCE, parallel=parallel)
    model, sequence = PackedModel(decoder), PagedSequence(list(PROMPT))
    logits = [model.step((sequence, count))[0] for count in (5, len(PROMPT) - 5)]
    for _ in range(NUM_TOKENS):
        sequence.token_ids.append(int(logits[-1][-1].argmax()))
        logits += model.step((sequence, 1))
    return torch.cat(logits)


def make_engine(
    path: Path,
    parallel: TensorParallel,
    *,
    num_blocks: int = 200,
    block_size: int = 4,
    kernels: Kernels = REFERENCE,
    tokenizer: Tokenizer | None = None,
    **options,
) -> Engine:
    decoder = load_model(path, dtype=torch.float32, device=CPU, kernels=kernels, parallel=parallel)
    config = EngineConfig(
        str(path),
        dtype="float32",
        block_size=block_size,
        kv_cache_bytes=num_blocks * decoder.bytes_per_block(block_size),
        max_model_len=160,
        tensor_parallel_size=parallel.size,
        **options,
    )
    return Engine(config, model=decoder, tokenizer=tokenizer)


def generate(
    path: Path, parallel: TensorParallel, requests: list[Request], **options
) -> tuple[list[list[int]], int]:
    """On rank 0: the tokens of each of `requests`, which come while others run, and how many preemptions
    there were.
    """
    engine = make_engine(path, parallel, **options)
    if parallel.rank > 0:
        engine.follow()
        return [], 0
    made = [[] for _ in requests]
    outputs = []
    for index, (prompt, params) in enumerate(requests):
        engine.add(EngineRequest(str(index), prompt, params))
        outputs += engine.step()
    while engine.has_unfinished:
        outputs += engine.step()
    for output in outputs:
        made[int(output.seq_id)] += output.token_ids
    engine.check_integrity()
    parallel.send(None)  # the end of `follow`; the ranks stay together for the next engine
    return made, engine.stats().num_preemptions


def generate_constrained(path: Path, parallel: TensorParallel, **options) -> dict[tuple[str, int], tuple]:
    """On rank 0: tokens, text and log probabilities of each choice of `constrained_requests`."""
    tokenizer = Tokenizer.from_transformers(make_tokenizer())
    engine = make_engine(path, parallel, tokenizer=tokenizer, max_num_seqs=8, **options)
    if parallel.rank > 0:
        engine.follow()
        return {}
    for name, (prompt, params) in constrained_requests().items():
        engine.add(EngineRequest(name, prompt, params))
    made: dict[tuple[str, int], tuple] = {}
    while engine.has_unfinished:
        for output in engine.step():
            token_ids, texts, logprobs = made.setdefault((output.seq_id, output.index), ([], [], []))
            token_ids += output.token_ids
            texts += [output.text, output.final_text]
            logprobs += [entry["logprob"] for entry in output.logprobs or ()]
    engine.check_integrity()
    parallel.send(None)
    return {key: (ids, "".join(texts), logprobs) for key, (ids, texts, logprobs) in made.items()}


def constrained_requests() -> dict[str, Request]:
    """Two choices of a grammar, with log probabilities and without a word; a word alone; and none of it."""
    some = {"temperature": 1.0, "seed": 11, "max_tokens": 30, "logprobs": 2}
    grammar = {"structured_outputs": {"regex": REGEX}}
    return {
        "grammar": (PROMPT, SamplingParams(n=2, bad_words=["b"], **grammar, **some)),
        "forced": (PROMPT[:9], SamplingParams(temperature=0, structured_outputs={"choice": [ONLY_CHOICE]})),
        "word": (PROMPT[:5], SamplingParams(bad_words=["a", "zz"], ignore_eos=True, **some)),
        "free": (PROMPT, SamplingParams(ignore_eos=True, **some)),
    }


def generate_replayed(path: Path, parallel: TensorParallel) -> tuple[list[list[list[int]]], int]:
    """On rank 0: what steps that are replayed make of each of `few_requests`. On each: how often it chose
    tokens.
    """
    if not HAS_TRITON:
        return [], 0
    from ingine.engine.kernels.select import triton_kernels

    build.capture_for = lambda device: capture
    options = {"max_num_seqs": 3, "async_scheduling": True, "kernels": triton_kernels()}
    with (
        patch.object(device_sampling, "greedy", wraps=device_sampling.greedy) as greedy,
        patch.object(device_sampling, "choose", wraps=device_sampling.choose) as choose,
    ):
        made = [generate(path, parallel, few, **options)[0] for few in few_requests()]
    return made, greedy.call_count + choose.call_count


def few_requests() -> list[list[Request]]:
    """Two greedy ones, two random ones, all kinds together. Short: their kernels are interpreted."""
    greedy, random_, penalised = requests()[:3]
    all_kinds = [greedy, random_, penalised]
    batches = [[greedy, greedy], [random_, (random_[0][::-1], random_[1])], all_kinds]
    return [
        [(prompt[:5], params.model_copy(update={"max_tokens": 4})) for prompt, params in b] for b in batches
    ]


def capture(step: Callable[[], None]) -> Callable[[], None]:
    """A tape with collectives on it, each as a whole: gloo runs them in threads of its own, and no dispatcher
    sees that they are waited for.
    """
    recorded = tape.Tape()

    def record(collective):
        def call(self, *args) -> torch.Tensor:
            with _disable_current_modes():
                result = collective(self, *args)
            recorded._calls.append(lambda: result.copy_(collective(self, *args)))
            return result

        return call

    names = ("all_reduce", "all_gather", "broadcast")
    originals = {name: getattr(TensorParallel, name) for name in names}
    for name, collective in originals.items():
        setattr(TensorParallel, name, record(collective))
    try:
        with tape._triton_launches_to(recorded._calls), tape._Recorder(recorded._calls):
            step()
    finally:
        for name, collective in originals.items():
            setattr(TensorParallel, name, collective)
    return recorded.replay


def requests() -> list[Request]:
    """Greedy with log probabilities of the prompt, at random and with penalties in turns. The last four begin
    alike.
    """
    rng = random.Random(7)
    some = [[rng.randrange(256) for _ in range(length)] for length in (1, 33, 4)]
    shared = [rng.randrange(256) for _ in range(40)]
    kinds = [
        {"temperature": 0.0, "prompt_logprobs": 2},
        {"temperature": 0.8, "top_p": 0.9, "seed": 3},
        {"temperature": 1.0, "seed": 4, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
    ]
    prompts = [*some, *([*shared, last] for last in range(4))]
    return [
        (prompt, SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, **kinds[index % len(kinds)]))
        for index, prompt in enumerate(prompts)
    ]


def follow(folder: Path, parallel: TensorParallel) -> None:
    """Follow as a worker's follower does: only rank 0 handles signals."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while parallel.receive() is not None:
        parallel.all_reduce(torch.ones(3))
        (folder / "following").touch()


def step(parallel: TensorParallel) -> None:
    parallel.send("step")
    parallel.all_reduce(torch.ones(3))


# ------------------------------------------------------------------------------------------- who is killed


def kill_rank_0(folder: Path) -> None:
    folder = folder / "kill-rank-0"
    folder.mkdir()

    def live(folder: Path, parallel: TensorParallel) -> None:
        if parallel.rank > 0:
            return follow(folder, parallel)
        step(parallel)
        signal.pause()

    first, follower = fork_ranks(folder, live)
    wait_until((folder / "following").exists, what="a follower")
    os.kill(follower, signal.SIGTERM)  # which it does not heed
    os.kill(first, signal.SIGKILL)
    ended = {"rank 0": end_of(first), "follower": end_of(follower)}
    (folder / "ended.json").write_text(json.dumps(ended))


def kill_a_follower(folder: Path) -> None:
    folder = folder / "kill-a-follower"
    folder.mkdir()

    def live(folder: Path, parallel: TensorParallel) -> None:
        if parallel.rank > 0:
            return follow(folder, parallel)
        step(parallel)
        wait_until((folder / "killed").exists, what="the follower's end")
        step(parallel)

    first, follower = fork_ranks(folder, live)
    wait_until((folder / "following").exists, what="a follower")
    os.kill(follower, signal.SIGKILL)
    ended = {"follower": end_of(follower)}
    (folder / "killed").touch()
    ended["rank 0"] = end_of(first)
    (folder / "ended.json").write_text(json.dumps(ended))


def fail_a_step(folder: Path) -> None:
    """Rank 0 runs out of memory, while the other waits for its logits."""
    model, folder = folder / "models" / "llama", folder / "fail-a-step"
    folder.mkdir()

    def out_of_memory(logits: torch.Tensor, width: int) -> torch.Tensor:
        raise RuntimeError("out of memory")

    def live(folder: Path, parallel: TensorParallel) -> None:
        engine = make_engine(model, parallel)
        if parallel.rank > 0:
            return engine.follow()
        engine.add(EngineRequest("one", PROMPT, SamplingParams()))
        parallel.all_gather = out_of_memory
        errors = [error_of(engine.step) for _ in range(2)]
        (folder / "errors.json").write_text(json.dumps(errors))

    ended = [end_of(pid) for pid in fork_ranks(folder, live)]
    (folder / "ended.json").write_text(json.dumps(ended))


def lose_a_step_before_sampling(folder: Path) -> None:
    """A step is lost whose tokens the masks of the next one need: the other rank has begun to sample that."""
    model, folder = folder / "models" / "llama", folder / "lose-a-step"
    folder.mkdir()

    def lost() -> list:
        raise RuntimeError("the device is gone")

    def live(folder: Path, parallel: TensorParallel) -> None:
        tokenizer = Tokenizer.from_transformers(make_tokenizer())
        engine = make_engine(model, parallel, tokenizer=tokenizer, async_scheduling=True)
        if parallel.rank > 0:
            return engine.follow()
        engine.add(EngineRequest("one", *constrained_requests()["grammar"]))
        while engine._in_flight is None:
            engine.step()
        engine._in_flight.result.wait = lost
        errors = [error_of(engine.step), error_of(lambda: parallel.send("more"))]
        (folder / "errors.json").write_text(json.dumps(errors))
        engine.close()

    ended = [end_of(pid) for pid in fork_ranks(folder, live)]
    (folder / "ended.json").write_text(json.dumps(ended))


def error_of(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:
        return repr(error)
    return "none"


# ------------------------------------------------------------------------------------------------- starting


def fork_ranks(folder: Path, live: Callable[[Path, TensorParallel], None]) -> list[int]:
    """Their pids, by rank. A rank that raises exits with 1, its error in FOLDER/error-<rank>."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pids = []
    for rank in range(SIZE):
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        signal.alarm(LONGEST_LIFE_S)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(SIZE)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        try:
            live(folder, TensorParallel.join(SIZE, CPU))
        except BaseException as error:
            traceback.print_exc()
            (folder / f"error-{rank}").write_text(repr(error))
            os._exit(1)
        os._exit(0)
    return pids


def end_of(pid: int) -> int:
    """Waits for it. Its exit status, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
