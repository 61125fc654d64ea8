"""A worker whose model has no tokenizer: jobs with token ids run, those with text fail and say why."""

import pytest

from ingine.cli.worker import _load_tokenizer
from ingine.contract.chat import Message
from ingine.contract.jobs import Job
from ingine.contract.record import JobStatus
from ingine.engine.config import EngineConfig
from ingine.engine.engine import Engine
from ingine.errors import ErrorCode
from ingine.sampling_params import SamplingParams
from tests.tiny_models import make_tiny_model

GREEDY = SamplingParams(max_tokens=8, temperature=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = make_tiny_model(tmp_path_factory.mktemp("tokenless"), "qwen2")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (path / name).unlink()
    return path


async def test_token_ids_run_and_text_is_refused(harness, model):
    config = EngineConfig(
        str(model), dtype="float32", device="cpu", max_num_seqs=4, kv_cache_bytes=8 << 20, max_model_len=64
    )
    worker = await harness(Engine(config))
    await worker.push(Job(id="ids", prompt=(40, 41, 42), sampling=GREEDY))
    await worker.push(Job(id="text", prompt="Hi", sampling=GREEDY))
    await worker.push(Job(id="chat", messages=(Message(role="user", content="Hi"),), sampling=GREEDY))
    stop = GREEDY.model_copy(update={"stop": ("x",)})
    await worker.push(Job(id="stop", prompt=(40, 41, 42), sampling=stop))
    events = await worker.events("ids")
    assert events[-1].status is JobStatus.FINISHED
    assert sum(len(event.token_ids) for event in events[:-1]) == 8
    for job_id, says in (("text", "tokenizer.json"), ("chat", "tokenizer.json"), ("stop", "stop_token_ids")):
        end = await worker.end(job_id)
        assert end.status is JobStatus.FAILED
        assert end.error["code"] == ErrorCode.INVALID_PARAMETER
        assert says in end.error["message"]


def test_the_process_beside_the_engine_s_has_no_tokenizer_either(model):
    assert _load_tokenizer(str(model)) is None
