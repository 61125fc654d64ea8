"""Runs an engine to the end, checking its books after every step."""

from dataclasses import dataclass, field

from ingine.engine.config import EngineConfig
from ingine.engine.engine import Engine
from ingine.engine.outputs import FinishReason, SeqOutput
from ingine.engine.request import EngineRequest
from ingine.message import Message, MessageAssembly, MessageDelta
from ingine.sampling_params import SamplingParams
from tests.engine.conftest import LoadedModel

LONGEST_SEQUENCE = 160


def greedy(max_tokens: int = 24, **options) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, **options)


def make_engine(
    model: LoadedModel, *, num_blocks: int | None = None, block_size: int = 4, **options
) -> Engine:
    """Make an engine, by default with small steps, small blocks, and memory for all sequences."""
    options = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "max_model_len": LONGEST_SEQUENCE} | options
    if num_blocks is not None:
        options["kv_cache_bytes"] = num_blocks * model.decoder.bytes_per_block(block_size)
    config = EngineConfig(str(model.path), dtype="float32", block_size=block_size, **options)
    return Engine(config, model=model.decoder, tokenizer=model.tokenizer)


@dataclass
class Result:
    """All that came out for one sequence, and where."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    """One an output; the text so far at each of `positions`."""
    positions: list[int] = field(default_factory=list)
    final_text: str = ""
    deltas: list[MessageDelta | None] = field(default_factory=list)
    """One an output, and what was held back."""
    message: Message | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    num_cached_tokens: int = 0

    def take(self, output: SeqOutput) -> None:
        assert self.finish_reason is None, "an output after the last"
        self.token_ids += output.token_ids
        self.logprobs += output.logprobs or []
        self.texts.append(output.text)
        self.positions.append(output.position)
        self.final_text = output.final_text
        self.deltas += [output.delta] if output.finish_reason is None else [output.delta, output.final_delta]
        self.message = output.message
        self.finish_reason, self.stop_reason = output.finish_reason, output.stop_reason
        self.num_cached_tokens = output.num_cached_tokens

    @property
    def text(self) -> str:
        return "".join(self.texts) + self.final_text

    def assembled(self, *earlier: MessageDelta | None) -> Message:
        """All deltas put together, behind earlier ones."""
        assembly = MessageAssembly()
        for delta in (*earlier, *self.deltas):
            assert delta is None or delta, "an empty delta is None"
            assembly.add(delta or MessageDelta())
        return assembly.message()


class Driver:
    """Steps an engine and keeps the results by sequence id. Choice 1 of `a` is `a/1`."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.results: dict[str, Result] = {}

    def step(self) -> list[SeqOutput]:
        outputs = self.engine.step()
        self.engine.check_integrity()
        for output in outputs:
            name = f"{output.seq_id}/{output.index}" if output.index else output.seq_id
            self.results.setdefault(name, Result()).take(output)
        return outputs

    def finish(self) -> dict[str, Result]:
        while self.engine.has_unfinished:
            self.step()
        assert self.engine.stats().num_free_blocks == self.engine.stats().num_blocks
        return self.results


def run_one(engine: Engine, prompt: list[int], params: SamplingParams, **options) -> Result:
    engine.add(EngineRequest("one", prompt, params, **options))
    return Driver(engine).finish()["one"]
