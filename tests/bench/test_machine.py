"""Result files are named after the CPU's instructions for matrix products."""

import platform

import pytest

from benchmarks.machine import ROOT, cpu_flags, cpu_kind, machine, report_text

AVX2 = "fma sse4_2 avx f16c avx2"
AVX512 = f"{AVX2} avx512f avx512dq avx512bw avx512vl"
ZEN4 = f"{AVX512} avx512_bf16 avx512_vnni"


@pytest.mark.parametrize(
    ("architecture", "flags", "kind"),
    [
        ("x86_64", "fma sse4_2 avx", "x86-64"),
        ("x86_64", f"{AVX2} avx_vnni", "avx2"),
        ("x86_64", f"{AVX512} avx512_vnni", "avx512"),
        ("x86_64", ZEN4, "avx512-bf16"),
        ("x86_64", f"{ZEN4} amx_tile amx_int8 amx_bf16", "amx"),
        ("AMD64", "", "x86-64"),
        ("aarch64", "", "neon"),
        ("arm64", "", "neon"),
        ("riscv64", "", "riscv64"),
    ],
)
def test_a_machine_is_of_the_widest_kind_whose_flags_it_has(architecture, flags, kind):
    assert cpu_kind(architecture, flags.split()) == kind


def test_a_report_says_the_kind_of_this_machine():
    assert machine()["kind"] == cpu_kind(platform.machine(), cpu_flags())


def test_a_report_does_not_tell_where_the_repository_lies():
    text = report_text({"files": f"{ROOT}/.rivals/models", "rate": 1})
    assert text == '{\n "files": ".rivals/models",\n "rate": 1\n}\n'
