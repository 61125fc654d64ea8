"""Jobs whose parameters forbid tokens: in the worker as in the engine, whoever tokenises the words."""

from ingine.contract.jobs import Job
from ingine.contract.record import JobStatus
from ingine.errors import ErrorCode
from ingine.sampling_params import SamplingParams
from ingine.worker.hosting.prompt_process import PromptProcess
from ingine.worker.prompts import INLINE_WORDS

LETTERS = {"temperature": 1.0, "seed": 3, "max_tokens": 40, "allowed_token_ids": tuple(range(64, 69))}
WORDS = ("ab", "ca", "e")


def job(job_id: str, **fields) -> Job:
    return Job(id=job_id, prompt="x", sampling=SamplingParams(**LETTERS | fields))


async def test_many_words_are_read_beside_the_worker(harness, monkeypatch):
    """They give the tokens that the same words give when the worker tokenises them itself."""
    here = await harness()
    read, read_beside = PromptProcess.read, []

    async def counted(process, tenant, cpu_s, *prompt, **options):
        read_beside.append(prompt)
        return await read(process, tenant, cpu_s, *prompt, **options)

    monkeypatch.setattr(PromptProcess, "read", counted)
    many = WORDS + tuple(f"x{number}" for number in range(INLINE_WORDS))
    for job_id, words in {"few": WORDS, "many": many}.items():
        await here.push(job(job_id, bad_words=words))
        assert (await here.end(job_id)).status is JobStatus.FINISHED
    assert read_beside == [many]
    text = await here.text("many")
    assert text == await here.text("few") and len(text) == 40
    assert not [word for word in WORDS if word in text]


async def test_a_job_whose_parameters_leave_no_token_ends_alone(harness):
    here = await harness()
    await here.push(job("good", bad_words=WORDS))
    await here.push(job("empty", allowed_token_ids=(64,), bad_words=("aaa",)))
    end = await here.end("empty")
    assert (end.status, end.error["code"], end.position) == (JobStatus.FAILED, ErrorCode.NO_ALLOWED_TOKEN, 2)
    assert (await here.end("good")).status is JobStatus.FINISHED


async def test_ids_beyond_the_vocabulary_are_refused(harness):
    here = await harness()
    await here.push(job("beyond", allowed_token_ids=(10**6,)))
    end = await here.end("beyond")
    assert end.error["code"] == ErrorCode.INVALID_PARAMETER
    assert "allowed_token_ids: 1000000 is not a token id" in end.error["message"]
