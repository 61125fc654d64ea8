"""Marks for the needs of tests: see tests/paths.py."""

import pytest

from tests.paths import MARCHES, needs

needs_native = needs(MARCHES["native"])
needs_amx = needs("native kernels that multiply with AMX")
needs_onednn_bfloat16 = needs("oneDNN in bfloat16")
needs_onednn_int8 = needs("oneDNN in int8 (VNNI)")
needs_triton = needs("Triton")
needs_interpreter = needs("Triton's interpreter")
"""Runs kernels on the CPU. Where there is a GPU, `make gpu-check` runs them there."""


def march(name: str, *, wide: bool = False) -> pytest.param:
    marks = [needs(MARCHES[name]), *([pytest.mark.wide] if wide else [])]
    return pytest.param(name, marks=marks)


EVERY_MARCH = [
    march("native"),
    march("x86-64-v4", wide=True),
    march("alderlake", wide=True),
    march("x86-64-v3"),
    march("x86-64"),
]
"""A build takes ten seconds of a core, and those in between differ little from their neighbours."""
