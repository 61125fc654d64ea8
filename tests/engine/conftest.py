"""Models for the engine's tests, made once a session: loading is most of the time that they take."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ingine.engine.kernels.select import select_kernels
from ingine.engine.models.decoder import Decoder
from ingine.engine.models.loader import load_model
from ingine.engine.text.tokenizer import Tokenizer
from tests.tiny_models import make_tiny_model, smollm2_path


@dataclass
class LoadedModel:
    """One folder as our decoder, as transformers' model, and what the latter says to a prompt."""

    path: Path
    decoder: Decoder
    tokenizer: Tokenizer
    hf_model: PreTrainedModel
    _expected: dict = field(default_factory=dict)

    @torch.inference_mode()
    def hf_greedy(self, prompt_token_ids: list[int], max_tokens: int) -> list[int]:
        """A function that generates greedily with transformers in float32."""
        key = (tuple(prompt_token_ids), max_tokens)
        if key not in self._expected:
            input_ids = torch.tensor([prompt_token_ids])
            output = self.hf_model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=max_tokens,
                do_sample=False,
                pad_token_id=0,
            )
            self._expected[key] = output[0, len(prompt_token_ids) :].tolist()
        return self._expected[key]


def load(path: Path) -> LoadedModel:
    device = torch.device("cpu")
    return LoadedModel(
        path=path,
        decoder=load_model(
            path, dtype=torch.float32, device=device, kernels=select_kernels(device, torch.float32)
        ),
        tokenizer=Tokenizer.from_folder(path),
        hf_model=AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
    )


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], LoadedModel]:
    """The tiny random model of an architecture."""
    return cache(lambda arch: load(make_tiny_model(tmp_path_factory.mktemp(arch), arch)))


@pytest.fixture(scope="session")
def llama(tiny) -> LoadedModel:
    return tiny("llama")


@pytest.fixture(scope="session")
def smollm2() -> LoadedModel:
    return load(smollm2_path())
