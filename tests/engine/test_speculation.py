"""Speculation does not change the tokens, whatever is drafted; and drafts are made only where they pay."""

import logging
import random
from itertools import count

import pytest
import torch

from ingine.engine.config import SPECULATIONS, EngineConfig
from ingine.engine.engine import Engine
from ingine.engine.kernels.select import REFERENCE, select_kernels
from ingine.engine.models.loader import load_model
from ingine.engine.request import EngineRequest
from ingine.engine.schedule.block_manager import BlockManager
from ingine.engine.schedule.output_history import OutputHistory
from ingine.engine.schedule.scheduler import Scheduler
from ingine.engine.schedule.sequence import Sequence
from ingine.engine.schedule.speculation import PROBE_INTERVAL, REFRESH_INTERVAL, Speculator
from ingine.sampling_params import SamplingParams
from tests.engine.conftest import LoadedModel
from tests.engine.driving import Driver, Result, greedy, make_engine, run_one
from tests.engine.test_equality import ARCHITECTURES, MAX_TOKENS, MIXES, PROMPTS, random_mix
from tests.engine.test_resume import PARAMS, PROMPT
from tests.tiny_models import make_tiny_model

# ----------------------------------------------------------------------------- whatever is drafted


class LyingOracle(Speculator):
    """Drafts what each sequence is known to become, with lies in between, at any cost."""

    def __init__(self, expected: dict[str, list[int]], seed: int = 0):
        super().__init__(8)
        self._expected = expected
        self._rng = random.Random(seed)

    def draft(self, seqs: list[Sequence], max_num_tokens: int) -> list[list[int]]:
        drafts = []
        for seq in seqs:
            room = min(max_num_tokens, seq.max_num_tokens - seq.num_tokens - 1)
            truth = [*self._expected[seq.seq_id][seq.num_output_tokens :], 7, 8, 9]  # it goes beyond an end
            draft = truth[: self._rng.randint(0, 6)][:room]
            drafts.append([t if self._rng.random() < 0.8 else self._rng.randrange(256) for t in draft])
            max_num_tokens -= len(draft)
        return drafts


def make_speculating_engine(model: LoadedModel, expected: dict[str, list[int]], **options) -> Engine:
    engine = make_engine(model, speculation="ngram", **options)
    engine._speculator = engine._scheduler._speculator = LyingOracle(expected)
    return engine


def assert_some_were_accepted(engine: Engine) -> None:
    stats = engine.stats()
    assert 0 < stats.num_accepted_tokens < stats.num_draft_tokens


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES.keys())
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_mix_gives_the_tokens_of_transformers(tiny, arch, mix):
    model = tiny(arch)
    expected = {str(i): model.hf_greedy(prompt, MAX_TOKENS) for i, prompt in enumerate(PROMPTS)}
    driver = Driver(make_speculating_engine(model, expected, **mix))
    for index, prompt in enumerate(PROMPTS):
        driver.engine.add(EngineRequest(str(index), prompt, greedy(MAX_TOKENS)))
        driver.step()
    results = driver.finish()
    assert {seq_id: result.token_ids for seq_id, result in results.items()} == expected
    if mix.get("max_num_batched_tokens") != 1:  # a draft is what the budget has left
        assert_some_were_accepted(driver.engine)


def assert_same(ours: Result, expected: Result) -> None:
    assert ours.token_ids == expected.token_ids
    assert (ours.text, ours.final_text) == (expected.text, expected.final_text)
    assert (ours.finish_reason, ours.stop_reason) == (expected.finish_reason, expected.stop_reason)
    for of_ours, of_expected in zip(ours.logprobs, expected.logprobs, strict=True):
        assert of_ours["token_id"] == of_expected["token_id"]
        assert of_ours["logprob"] == pytest.approx(of_expected["logprob"], abs=1e-4)


def test_every_kind_of_sampling_draws_the_same_alone_and_in_one_batch(llama):
    """Penalties, min_tokens and seeds go by what a sequence is at each position of its draft."""
    alone = {name: run_one(make_engine(llama), PROMPT, params) for name, params in PARAMS.items()}
    expected = {name: result.token_ids for name, result in alone.items()}
    for options in ({"max_num_seqs": 1}, {"max_num_seqs": 6, "max_num_batched_tokens": 40}):
        driver = Driver(make_speculating_engine(llama, expected, **options))
        for name, params in PARAMS.items():
            driver.engine.add(EngineRequest(name, PROMPT, params))
        results = driver.finish()
        assert_some_were_accepted(driver.engine)
        for name, result in results.items():
            assert_same(result, alone[name])


def test_a_stop_string_within_a_draft_ends_it_there(llama):
    text = run_one(make_engine(llama), PROMPT, PARAMS["random"]).text
    for start in range(0, len(text) - 4, 3):
        params = PARAMS["random"].model_copy(update={"stop": (text[start : start + 4],)})
        expected = run_one(make_engine(llama), PROMPT, params)
        engine = make_speculating_engine(llama, {"one": expected.token_ids})
        assert_same(run_one(engine, PROMPT, params), expected)


def test_resumed_at_every_position(llama):
    """All runs use one engine, so that the prefix cache has what earlier ones computed, drafts included."""
    for params in (PARAMS["greedy"], PARAMS["penalties"]):
        whole = run_one(make_engine(llama), PROMPT, params).token_ids
        engine = make_speculating_engine(llama, {"one": whole}, block_size=1)
        for position in range(len(whole)):
            rest = run_one(engine, PROMPT, params, output_token_ids=whole[:position])
            assert whole[:position] + rest.token_ids == whole
        assert_some_were_accepted(engine)


@pytest.mark.parametrize("seed", range(12))
def test_random_mixes_with_aborts_and_resumptions(tiny, seed):
    """The mixes are those without speculation: little memory, shared prefixes, and each with its own
    sampling."""
    rng = random.Random(seed)
    model = tiny(ARCHITECTURES[seed % len(ARCHITECTURES)])
    params = [PARAMS[rng.choice(list(PARAMS))] for _ in PROMPTS]
    expected = {
        str(i): run_one(make_engine(model), prompt, params[i]).token_ids for i, prompt in enumerate(PROMPTS)
    }

    def new_driver() -> Driver:
        return Driver(make_speculating_engine(model, expected, **random_mix(rng)))

    driver = new_driver()
    output: dict[str, list[int]] = {seq_id: [] for seq_id in expected}
    waiting, running = list(expected), []
    while waiting or running:
        event = rng.random()
        if waiting and event < 0.5:
            seq_id = waiting.pop(rng.randrange(len(waiting)))
            index = int(seq_id)
            driver.engine.add(
                EngineRequest(seq_id, PROMPTS[index], params[index], output_token_ids=output[seq_id])
            )
            running.append(seq_id)
        elif running and event < 0.56:
            seq_id = running.pop(rng.randrange(len(running)))
            driver.engine.abort(seq_id)
            waiting.append(seq_id)
        elif event < 0.58:
            driver = new_driver()
            waiting, running = waiting + running, []
        for step_output in driver.step():
            output[step_output.seq_id] += step_output.token_ids
            if step_output.finish_reason:
                running.remove(step_output.seq_id)
    assert output == expected


def test_ngrams_too_are_exact_and_find_what_repeats(llama, monkeypatch):
    """The real thing, in a model that is made to repeat itself, drafting as if it cost nothing."""
    monkeypatch.setattr(Speculator, "_limits", lambda self, num_seqs: (0.05, 8))
    bias = {token_id: 12.0 for token_id in range(65, 69)}
    for params in (greedy(60, logit_bias=bias), SamplingParams(max_tokens=60, seed=1, logit_bias=bias)):
        expected = run_one(make_engine(llama), PROMPT, params)
        engine = make_engine(llama, speculation="ngram")
        assert_same(run_one(engine, PROMPT, params), expected)
        assert_some_were_accepted(engine)


def test_a_step_alone_and_a_step_that_fails_leave_drafts_out_of_the_account(llama, monkeypatch):
    expected = llama.hf_greedy(PROMPT, MAX_TOKENS)
    driver = Driver(make_speculating_engine(llama, {"a": expected, "b": expected}))
    for seq_id in "ab":
        driver.engine.add(EngineRequest(seq_id, PROMPT, greedy(MAX_TOKENS)))
    while len(driver.results) < 2:
        driver.step()
    with monkeypatch.context() as patch:
        patch.setattr("ingine.engine.run.model_runner.sample", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            driver.step()
    driver.engine.check_integrity()
    for output in driver.engine.step(alone="b"):
        assert len(output.token_ids) == 1
        driver.results["b"].take(output)
    assert [result.token_ids for result in driver.finish().values()] == [expected, expected]


@pytest.mark.parametrize("kernels", ["native", "reference"])
def test_a_draft_that_is_not_finite_costs_no_more_than_the_drafts(tmp_path, kernels):
    """Attention multiplies what a token does not see by 0, and 0 times NaN is NaN: so it may reach others."""
    path = make_tiny_model(tmp_path, "llama")
    cpu = torch.device("cpu")
    chosen = REFERENCE if kernels == "reference" else select_kernels(cpu, torch.float32)
    decoder = load_model(path, dtype=torch.float32, device=cpu, kernels=chosen)
    poison, embedding = 250, decoder.embedding

    def poisoned(token_ids):
        return embedding(token_ids).masked_fill((token_ids == poison)[:, None], torch.nan)

    def generate(speculator=None):
        config = EngineConfig(str(path), dtype="float32", kv_cache_bytes=1 << 20, speculation="ngram")
        engine = Engine(config, model=decoder)
        if speculator:
            engine._scheduler._speculator.draft = speculator
        driver = Driver(engine)
        engine.add(EngineRequest("one", PROMPT, greedy(MAX_TOKENS)))
        return driver.finish()["one"]

    expected = generate()
    assert poison not in [*PROMPT, *expected.token_ids] and expected.finish_reason == "length"
    decoder.embedding = poisoned
    drafted = generate(lambda seqs, _: [[poison, poison] if seq.drafter else [] for seq in seqs])
    assert (drafted.token_ids, drafted.finish_reason) == (expected.token_ids, "length")


def test_logits_of_nan_end_a_sequence_that_speculates_once_they_are_so_without_drafts(llama, monkeypatch):
    expected = llama.hf_greedy(PROMPT, MAX_TOKENS)
    engine = make_speculating_engine(llama, {"one": expected}, block_size=1)
    engine._scheduler._speculator.draft = lambda seqs, _: [
        expected[1:4] if seq.drafter else [] for seq in seqs
    ]
    driver = Driver(engine)
    engine.add(EngineRequest("one", PROMPT, greedy(MAX_TOKENS)))
    while not driver.results:
        driver.step()
    compute_logits = llama.decoder.compute_logits

    with monkeypatch.context() as patch:  # of the last position, drafted or not
        patch.setattr(
            llama.decoder,
            "compute_logits",
            lambda hidden: compute_logits(hidden).index_fill(0, torch.tensor([len(hidden) - 1]), torch.nan),
        )
        result = driver.finish()["one"]
    assert (result.token_ids, result.finish_reason) == (expected[:4], "error")
    assert not engine._blocks._hash_of_block, "nothing that it computed is to be trusted"


def test_a_sequence_that_has_ended_when_it_comes_leaves_an_empty_step(llama):
    engine = make_engine(llama, speculation="ngram")
    result = run_one(engine, PROMPT, greedy(2), output_token_ids=[1, 2])
    assert (result.token_ids, result.finish_reason) == ([], "length")


def test_the_trace_tells_drafts_from_prefills(llama, caplog):
    engine = make_speculating_engine(llama, {"one": llama.hf_greedy(PROMPT, MAX_TOKENS)})
    with caplog.at_level(logging.DEBUG, logger="ingine.engine.engine"):
        run_one(engine, PROMPT, greedy(MAX_TOKENS))
    drafted = [record.getMessage() for record in caplog.records if " drafted | " in record.getMessage()]
    assert drafted and all(line.startswith("prefill 0 tok/0 seq | decode 1, ") for line in drafted)


# ------------------------------------------------------------------------------------- its place


_serials = count(1000)


def make_sequence(seq_id: str, num_tokens: int, **params) -> Sequence:
    serial = next(_serials)
    prompt = [serial] * num_tokens  # a period of one, which is drafted from the first token on
    request = EngineRequest(seq_id, prompt, SamplingParams(**{"max_tokens": 100, "temperature": 0, **params}))
    seq = Sequence(request, seed=0, sort_key=(0, serial), max_num_tokens=10_000)
    Generous(8).begin(seq)
    return seq


def decoding(scheduler: Scheduler, *seqs: Sequence) -> None:
    """Bring all of them to where they decode."""
    for seq in seqs:
        scheduler.add(seq)
    while any(seq.num_uncomputed_tokens != 1 or not seq.num_output_tokens for seq in seqs):
        scheduler.advance(batch := scheduler.schedule())
        scheduler.settle(batch)
        for seq in batch.caught_up:
            seq.append(seq.token_ids[0])


class Generous(Speculator):
    """A policy that drafts as if it cost nothing."""

    def _limits(self, num_seqs: int) -> tuple[float, int]:
        return 0.05, self._num_speculative_tokens


def make_scheduler(*, num_blocks: int = 64, budget: int = 32) -> Scheduler:
    blocks = BlockManager(num_blocks, block_size=4)
    return Scheduler(blocks, max_num_seqs=4, max_num_batched_tokens=budget, speculator=Generous(8))


def test_a_draft_takes_what_the_budget_has_left():
    scheduler = make_scheduler(budget=6)
    decoding(scheduler, make_sequence("a", 4), make_sequence("b", 4))
    batch = scheduler.schedule()
    assert batch.num_tokens == [1, 1] and batch.num_draft_tokens == 4


def test_nothing_is_drafted_beside_a_prefill():
    scheduler = make_scheduler()
    decoding(scheduler, make_sequence("a", 4))
    assert scheduler.schedule().num_draft_tokens > 0
    scheduler.add(make_sequence("b", 9))
    assert scheduler.schedule().drafts == [[], []]


def test_nothing_is_drafted_beyond_the_last_token():
    scheduler = make_scheduler()
    decoding(scheduler, make_sequence("a", 4, max_tokens=4))  # it has one: two to draft, one to sample
    assert len(scheduler.schedule().drafts[0]) == 2


def test_nobody_loses_a_block_to_a_draft():
    """Eight of ten blocks are in use, and both may want another one in the next step."""
    scheduler = make_scheduler(num_blocks=10)
    seqs = [make_sequence(name, 14) for name in "ab"]
    decoding(scheduler, *seqs)
    assert scheduler.block_manager.num_free_blocks == 2
    for seq in seqs:
        seq.append(seq.token_ids[0])  # the block is full with it: a draft needs another one
        seq.num_computed_tokens += 1
    batch = scheduler.schedule()
    assert batch.drafts == [[], []] and scheduler.block_manager.num_free_blocks == 2


# ------------------------------------------------------------------------------------ where it pays


class Simulation:
    """Sequences whose tokens are known, and a machine that takes `base` + `per_row` for each row, in ms.

    Its time is noisy, as measured ones are: each step takes up to half as long again, some five times.
    """

    def __init__(
        self,
        num_seqs: int,
        *,
        base: float,
        per_row: float,
        repeats: bool,
        noisy: bool = True,
        outputs: OutputHistory | None = None,
    ):
        self.speculator = Speculator(8, outputs)
        self.rng = random.Random(num_seqs)
        self.seqs = [make_sequence(str(index), 2, max_tokens=5000) for index in range(num_seqs)]
        for seq in self.seqs:
            self.speculator.begin(seq)
        self._base, self._per_row = base, per_row
        self._repeats = repeats
        self._noisy = noisy

    def _next_token(self, seq: Sequence) -> int:
        """The next token of a text with a period of 20 tokens, or of one in which a pair hardly predicts the
        next."""
        if self._repeats:
            return seq.num_output_tokens % 20
        return self.rng.randrange(4)

    def step(self) -> tuple[int, int, float]:
        """Tokens that came, tokens that were drafted, and ms, less what noise added."""
        drafts = self.speculator.draft(self.seqs, 512)
        num_drafted, num_tokens = sum(map(len, drafts)), 0
        for seq, draft in zip(self.seqs, drafts, strict=True):
            for drafted in [*draft, None]:
                seq.append(self._next_token(seq))
                num_tokens += 1
                if seq.token_ids[-1] != drafted:
                    break
        ms = self._base + self._per_row * (len(self.seqs) + num_drafted)
        noise = self.rng.choice([1] * 8 + [1.5, 5]) * self.rng.uniform(1, 1.2) if self._noisy else 1
        self.speculator.observe(len(self.seqs), num_drafted, ms * noise / 1e3)
        return num_tokens, num_drafted, ms

    def speedup(self, num_steps: int = 400) -> float:
        """Tokens a second with speculation over those without."""
        steps = [self.step() for _ in range(num_steps)]
        rate = sum(num_tokens for num_tokens, _, _ in steps) / sum(ms for _, _, ms in steps)
        return rate * (self._base + self._per_row * len(self.seqs)) / len(self.seqs)


MACHINES = {
    "waits for weights": {"base": 14.0, "per_row": 0.5},
    "waits for arithmetic": {"base": 1.0, "per_row": 1.0},
    "overhead only": {"base": 10.0, "per_row": 0.0},
}


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES.keys())
@pytest.mark.parametrize("num_seqs", [1, 8, 32])
@pytest.mark.parametrize("method", SPECULATIONS)
def test_where_nothing_repeats_it_costs_next_to_nothing(num_seqs, machine, method):
    """This includes outputs that agree by chance, in which any two tokens recur again and again."""
    outputs = OutputHistory(20_000) if method == "suffix" else None
    if outputs is not None:
        outputs.add("", random.Random(0).choices(range(4), k=5000))
    assert Simulation(num_seqs, **machine, repeats=False, outputs=outputs).speedup() > 0.97


def test_free_text_is_hardly_drafted_whatever_the_history(machine=MACHINES["waits for weights"]):
    """Guesses are looked up at each token, and only computed while the rate says that they pay."""
    outputs = OutputHistory(20_000)
    outputs.add("", random.Random(0).choices(range(100), k=9000))
    simulation = Simulation(8, **machine, repeats=False, noisy=False, outputs=outputs)
    simulation._next_token = lambda seq: simulation.rng.randrange(100)
    num_drafted = [simulation.step()[1] for _ in range(400)]
    assert sum(num_drafted) < 0.01 * 8 * 400


def test_where_text_repeats_it_pays_by_what_a_row_costs():
    def speedup(num_seqs: int, machine: str) -> float:
        return Simulation(num_seqs, **MACHINES[machine], repeats=True).speedup()

    assert speedup(1, "waits for weights") > 4
    assert speedup(32, "waits for weights") > 1.2
    assert speedup(32, "overhead only") > 6
    assert 0.97 < speedup(32, "waits for arithmetic") < 1.03


def test_first_a_few_plain_steps_then_a_single_token_then_what_pays():
    simulation = Simulation(1, **MACHINES["waits for weights"], repeats=True, noisy=False)
    num_drafted = [simulation.step()[1] for _ in range(60)]
    first = next(step for step, num in enumerate(num_drafted) if num)
    assert num_drafted[first : first + 2] == [1, 8]


def test_a_plain_step_is_due_now_and_then():
    simulation = Simulation(1, **MACHINES["overhead only"], repeats=True, noisy=False)
    num_drafted = [simulation.step()[1] for _ in range(10 * REFRESH_INTERVAL)]
    last = num_drafted[-REFRESH_INTERVAL - 1 :]
    assert last.count(0) == 1


def test_drafts_before_a_plain_step_of_their_size_tell_nothing():
    speculator = Speculator(8)
    speculator.observe(num_seqs=2, num_draft_tokens=3, seconds=0.02)
    assert not speculator._cost(2).per_draft_token_s


def test_what_was_too_dear_is_tried_again():
    """The machine was busy while the cost of drafts was measured."""
    simulation = Simulation(8, base=0.0, per_row=1.0, repeats=True, noisy=False)
    num_drafted = [simulation.step()[1] for _ in range(100)]
    assert any(num_drafted) and not any(num_drafted[-50:])
    simulation._base, simulation._per_row = 9.0, 0.0
    num_drafted = [simulation.step()[1] for _ in range(2 * PROBE_INTERVAL)]
    assert num_drafted[-2:] == [64, 64] or num_drafted[-3:-1] == [64, 64]
