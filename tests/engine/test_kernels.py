"""Which kernels a model gets."""

import logging

import pytest
import torch

from ingine.errors import ConfigError
from ingine.kernels import select_kernels


def test_the_choice_of_kernels_is_logged_in_one_line(caplog):
    with caplog.at_level(logging.INFO, logger="ingine.kernels"):
        kernels = select_kernels(torch.device("cpu"), torch.float32)
    assert [record.message for record in caplog.records] == [
        f"kernels on cpu, float32: attention {kernels.attention.name}, layer operations {kernels.ops.name}, "
        f"weights {kernels.weights.name}"
    ]


def test_int8_weights_are_refused_where_they_cannot_be():
    with pytest.raises(ConfigError, match="quantization 'int8' needs an x86 CPU with VNNI; this is meta"):
        select_kernels(torch.device("meta"), torch.bfloat16, quantization="int8")
