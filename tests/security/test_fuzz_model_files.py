"""The first cases of `benchmarks/fuzz_model_files.py`, which can run for any length of time."""

import pytest

from tests.security.model_mutations import Mutator
from tests.security.model_parsers import PARSERS, VALID, Child
from tests.waiting import HANGS_S


@pytest.fixture(scope="module")
def child():
    child = Child(HANGS_S)
    yield child
    child.close()


@pytest.mark.parametrize("num_cases", [40, pytest.param(1000, marks=pytest.mark.wide)])
@pytest.mark.parametrize("parser", PARSERS)
def test_damage_is_a_model_still_or_an_error_that_says_what(parser, num_cases, child, tmp_path):
    mutator, kinds = Mutator(parser, tmp_path / "fuzz", seed=num_cases), set()
    for number in range(num_cases):
        outcome = child.attempt(parser, mutator.next())
        assert not outcome.is_finding, (number, outcome)
        kinds.add(outcome.kind)
    assert VALID in kinds and len(kinds) > 1  # some damage is harmless, and some is detected
