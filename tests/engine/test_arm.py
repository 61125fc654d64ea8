"""The matrix products for ARM, cross-compiled and run in an emulator: beside textbook ones, without torch."""

import subprocess
from pathlib import Path

import pytest

from ingine.native.compiler import FLAGS, SOURCES
from tests.paths import ARM_COMPILER, ARM_EMULATOR, needs

MARCHES = {
    "armv8-a": ["neon", "neon", "neon"],
    "armv8.6-a": ["neon", "neon", "neon-dotprod"],  # has bf16, i8mm and dotprod
}

pytestmark = needs("products for ARM (a cross compiler and qemu-user)")


def run(march: str, source: str, program: str, folder: Path) -> list[str]:
    """What `program`, beside this file, prints about `source` of the kernels; its status has to be 0."""
    binary = folder / "check"
    command = [ARM_COMPILER, *FLAGS, f"-march={march}", "-Werror", "-static", "-pthread", f"-I{SOURCES}"]
    subprocess.run([*command, SOURCES / source, Path(__file__).with_name(program), "-o", binary], check=True)
    emulated = [ARM_EMULATOR, "-cpu", "max", binary]
    done = subprocess.run(emulated, env={"OMP_NUM_THREADS": "2"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("march", MARCHES)
def test_products_for_arm_are_right_and_the_same_bits_in_any_batch(march, tmp_path):
    assert run(march, "linear.cpp", "linear_check.cpp", tmp_path) == MARCHES[march]


@pytest.mark.parametrize("march", MARCHES)
def test_products_of_weights_in_blocks_are_too(march, tmp_path):
    run(march, "blocks.cpp", "blocks_check.cpp", tmp_path)
