"""One sequence and its tokens: the text of each, and the end."""

import torch

from ingine.engine.request import EngineRequest
from ingine.engine.sample.processors import process
from ingine.engine.schedule.sequence import Sequence
from ingine.sampling_params import MAX_LOGIT_BIASES, MAX_STOP_TOKEN_IDS, SamplingParams

EOS = 0


class Pieces:
    """A tokenizer whose token i is `pieces[i]`."""

    def __init__(self, *pieces: bytes):
        self._pieces = pieces

    def token_bytes(self, token_id: int, *, first: bool) -> bytes:
        return self._pieces[token_id]


def make_sequence(pieces: Pieces, output: list[int] = (), **params) -> Sequence:
    return Sequence(
        EngineRequest("seq", [EOS], SamplingParams(**params), output_token_ids=output),
        seed=0,
        sort_key=(0, 0),
        max_num_tokens=100,
        eos_token_ids=frozenset({EOS}),
        tokenizer=pieces,
    )


def test_half_a_character_after_a_stop_string_is_not_part_of_the_text():
    seq = make_sequence(Pieces(b"", b"yes", "STOPé".encode()[:-1]), stop=("STOP",))
    assert [seq.append(1), seq.append(2)] == ["yes", ""]
    assert seq.finish_reason == "stop"
    assert seq.output([2]).final_text == ""


def test_half_a_character_before_the_end_is_flushed():
    seq = make_sequence(Pieces(b"", b"yes", "é".encode()[:-1]))
    assert [seq.append(token_id) for token_id in (1, 2, EOS)] == ["yes", "", ""]
    assert seq.output([EOS]).final_text == "\ufffd"


def test_a_replayed_sequence_holds_back_what_it_held_back():
    pieces = Pieces(b"", b"yes S", b"TO", b"DAY", b"P")
    seq = make_sequence(pieces, output=[1, 2], stop=("STOP",))
    assert seq.append(3) == "STODAY"
    seq = make_sequence(pieces, output=[1, 2], stop=("STOP",))
    assert seq.append(4) == "" and seq.stop_reason == "STOP"


def test_end_of_sequence_as_a_stop_token_of_the_request_names_itself():
    for params, stop_reason in (({}, None), ({"stop_token_ids": (EOS,), "ignore_eos": True}, EOS)):
        seq = make_sequence(Pieces(b""), **params)
        seq.append(EOS)
        assert (seq.finish_reason, seq.stop_reason) == ("stop", stop_reason)


class Watched:
    """Counts how often somebody walks it."""

    num_walks = 0

    def __iter__(self):
        self.num_walks += 1
        return super().__iter__()

    def __contains__(self, item):
        if isinstance(self, tuple):
            self.num_walks += 1
        return super().__contains__(item)

    def values(self):
        self.num_walks += 1
        return super().values()


class WatchedTuple(Watched, tuple):
    pass


class WatchedSet(Watched, frozenset):
    pass


class WatchedDict(Watched, dict):
    pass


def test_no_step_walks_a_list_of_the_request():
    """It may be long, and there are many steps: each is read once, when the sequence is made."""
    stop = WatchedTuple(range(1, MAX_STOP_TOKEN_IDS + 1))
    bias = WatchedDict.fromkeys(range(MAX_LOGIT_BIASES), 1.0)
    params = SamplingParams(min_tokens=50).model_copy(update={"stop_token_ids": stop, "logit_bias": bias})
    seq = Sequence(
        EngineRequest("a", [0], params),
        seed=0,
        sort_key=(0, 0),
        max_num_tokens=100,
        eos_token_ids=frozenset({0}),
    )
    end_token_ids = seq.output_text.end_token_ids = WatchedSet(seq.output_text.end_token_ids)
    walks_to_make_it = stop.num_walks, bias.num_walks
    for _ in range(20):
        logits = process(torch.zeros(1, 2048), [seq])
        assert logits[0, :1025].isneginf().all() and logits[0, 1025:].eq(0).all()
        seq.append(2000)
        process(torch.zeros(1, 2048), [*seq.ahead([2000])])
    assert (stop.num_walks, bias.num_walks) == walks_to_make_it
    assert end_token_ids.num_walks == 0
    seq.append(7)
    assert (seq.finish_reason, seq.stop_reason) == ("stop", 7)
