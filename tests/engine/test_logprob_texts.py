"""Log probabilities come with the bytes of their tokens, so that a consumer needs no tokenizer."""

import pytest

from ingine.engine.text.detokenizer import Detokenizer
from ingine.sampling_params import SamplingParams
from tests.engine.conftest import LoadedModel
from tests.engine.driving import make_engine, run_one
from tests.tiny_models import EOS_TOKEN_ID

PROMPT = [*range(60, 80)]
SOME = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, logprobs=3)


def logprobs_of(model: LoadedModel, params: SamplingParams, **options) -> tuple[list[dict], str]:
    result = run_one(make_engine(model, **options), PROMPT, params)
    return result.logprobs, result.text


def test_the_bytes_of_the_tokens_are_the_text(llama):
    """This holds even if a character is several tokens, as here, where a token is one byte."""
    entries, text = logprobs_of(llama, SOME)
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode(errors="replace") == text
    for entry in entries:
        assert len(entry["top_bytes"]) == len(entry["top"]) == 3
        assert entry["top_bytes"][0] == entry["bytes"]  # the likeliest is the one that was chosen
        assert entry["decoded_token"] == bytes(entry["bytes"]).decode(errors="replace")
        texts = [bytes(of_token).decode(errors="replace") for of_token in entry["top_bytes"]]
        assert (entry["top_decoded_tokens"], entry["rank"]) == (texts, 1)


def test_a_special_token_has_its_name(llama):
    """It adds nothing to the text."""
    params = SOME.model_copy(update={"logit_bias": {EOS_TOKEN_ID: 100.0}, "ignore_eos": False})
    entries, text = logprobs_of(llama, params)
    assert (bytes(entries[-1]["bytes"]), text) == (b"<|im_end|>", "")


def test_with_speculation_each_token_has_its_own(llama):
    params = SOME.model_copy(update={"repetition_penalty": 0.5})  # it repeats itself: drafts come true
    plain, _ = logprobs_of(llama, params)
    drafted, _ = logprobs_of(llama, params, speculation="ngram")
    assert [entry["bytes"] for entry in drafted] == [entry["bytes"] for entry in plain]


def test_without_a_tokenizer_there_are_none(llama):
    engine = make_engine(llama)
    engine.tokenizer = None
    assert all("bytes" not in entry for entry in run_one(engine, PROMPT, SOME).logprobs)
    without_text = run_one(make_engine(llama), PROMPT, SOME.model_copy(update={"detokenize": False}))
    assert without_text.text == ""
    assert all(entry.keys() == {"token_id", "logprob", "rank", "top"} for entry in without_text.logprobs)


def test_who_asks_for_no_logprobs_pays_nothing(llama, monkeypatch):
    asked = []
    monkeypatch.setattr(Detokenizer, "token_bytes", lambda self, token_id: asked.append(token_id) or b"")
    result = run_one(make_engine(llama), PROMPT, SOME.model_copy(update={"logprobs": None}))
    assert len(result.token_ids) == 30 and not asked


@pytest.mark.parametrize(
    "pieces", [[b" Hi", b" there"], [None, b" Hi"]], ids=["text", "a special token first"]
)
def test_the_first_token_is_what_begins_the_text(pieces):
    """A tokenizer may leave out the space that begins a text; a special token is not its beginning."""

    class Llama2:
        def token_bytes(self, token_id: int, *, first: bool) -> bytes | None:
            return pieces[token_id].lstrip() if first and pieces[token_id] else pieces[token_id]

        def special_token(self, token_id: int) -> str:
            return "<s>"

    detokenizer = Detokenizer(Llama2())
    named, text = b"", ""
    for token_id in range(2):
        named += detokenizer.token_bytes(token_id)
        text += detokenizer.append(token_id)
    assert named.decode().removeprefix("<s>") == text
