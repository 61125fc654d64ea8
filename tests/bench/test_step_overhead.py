"""The benchmark of a step without the model's cost."""

import pytest

from benchmarks import step_overhead
from benchmarks.step_overhead import KINDS, StandInDecoder
from ingine.engine.models.config import ModelConfig
from ingine.engine.models.interface import Model
from ingine.engine.text.tokenizer import Tokenizer
from tests.tiny_models import make_tiny_model


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_told_by_its_parts(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(step_overhead, "NUM_STEPS", 2)
    monkeypatch.setattr(step_overhead, "NUM_ROUNDS", 1)
    path = make_tiny_model(tmp_path, vocab_size=2048)
    model = StandInDecoder(ModelConfig.from_folder(path))
    assert isinstance(model, Model)
    row = step_overhead.measure(2, KINDS[kind], model, Tokenizer.from_folder(path))
    assert len([float(figure) for figure in row.split(" | ")]) == 9
