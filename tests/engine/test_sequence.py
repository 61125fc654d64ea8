"""How one sequence takes its tokens: the text of each, and the end."""

from ingine.detokenizer import Detokenizer
from ingine.sampling_params import SamplingParams
from ingine.sequence import Sequence

EOS = 0


class Pieces:
    """A tokenizer whose token i is `pieces[i]`."""

    def __init__(self, *pieces: bytes):
        self._pieces = pieces

    def token_bytes(self, token_id: int, *, first: bool) -> bytes:
        return self._pieces[token_id]


def make_sequence(pieces: Pieces, output: list[int] = (), **params) -> Sequence:
    return Sequence(
        "seq",
        [EOS],
        SamplingParams(**params),
        seed=0,
        sort_key=(0, 0),
        max_num_tokens=100,
        eos_token_ids=frozenset({EOS}),
        detokenizer=Detokenizer(pieces),
        output_token_ids=output,
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


def test_what_may_start_a_stop_string_is_flushed_at_the_end():
    seq = make_sequence(Pieces(b"", b"yes ST"), stop=("STOP",), max_tokens=1)
    assert seq.append(1) == "yes "
    output = seq.output([1])
    assert (output.finish_reason, output.final_text) == ("length", "ST")


def test_a_stop_string_on_the_last_token_counts_as_stop():
    seq = make_sequence(Pieces(b"", b"STOP"), stop=("STOP",), max_tokens=1)
    seq.append(1)
    assert (seq.finish_reason, seq.stop_reason) == ("stop", "STOP")


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
