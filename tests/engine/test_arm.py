"""The native kernels for ARM, cross-compiled and run in an emulator: beside textbook ones, without torch."""

import subprocess
from pathlib import Path

import pytest

from ingine.engine.kernels.native.compiler import FLAGS, SOURCES
from tests.paths import ARM_COMPILER, ARM_EMULATOR, needs

FOLDER = Path(__file__).parent

MARCHES = {
    "armv8-a": ["neon", "neon", "neon"],
    "armv8.2-a+dotprod": ["neon", "neon", "neon-dotprod"],
    "armv8.6-a": ["neon", "neon-bf16", "neon-dotprod"],  # has bf16, i8mm and dotprod
}

pytestmark = needs("kernels for ARM (a cross compiler and qemu-user)")


def run(kernel: str, march: str, folder: Path) -> list[str]:
    """Run the program that checks a kernel, built for `march`, on two threads.

    Returns its output; its status is 0.
    """
    binary = folder / "check"
    command = [ARM_COMPILER, *FLAGS, f"-march={march}", "-Werror", "-static", "-pthread", f"-I{SOURCES}"]
    sources = [SOURCES / f"{kernel}.cpp", FOLDER / f"{kernel}_check.cpp"]
    subprocess.run([*command, *sources, "-o", binary], check=True)
    emulated = [ARM_EMULATOR, "-cpu", "max", binary]
    done = subprocess.run(emulated, env={"OMP_NUM_THREADS": "2"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("march", MARCHES)
def test_products_for_arm_are_right_and_the_same_bits_in_any_batch(march, tmp_path):
    assert run("linear", march, tmp_path) == MARCHES[march]


@pytest.mark.parametrize("march", MARCHES)
def test_products_of_weights_in_blocks_are_too(march, tmp_path):
    run("blocks", march, tmp_path)


def test_attention_for_arm_is_right_and_the_same_bits_whole_or_token_by_token(tmp_path):
    assert run("attention", "armv8-a", tmp_path) == ["float32", "int8", "int4"]
