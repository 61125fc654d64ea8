"""The matrix products for ARM, cross-compiled and run in an emulator: beside textbook ones, without torch."""

import subprocess
from pathlib import Path

import pytest

from ingine.native.compiler import FLAGS, SOURCES
from tests.paths import ARM_COMPILER, ARM_EMULATOR, needs

PROGRAM = Path(__file__).with_name("linear_check.cpp")


@needs("products for ARM (a cross compiler and qemu-user)")
@pytest.mark.parametrize(
    ("march", "isas"),
    [
        ("armv8-a", ["neon", "neon", "neon"]),
        ("armv8.6-a", ["neon", "neon", "neon-dotprod"]),  # has bf16, i8mm and dotprod
    ],
)
def test_products_for_arm_are_right_and_the_same_bits_in_any_batch(march, isas, tmp_path):
    binary = tmp_path / "linear_check"
    command = [ARM_COMPILER, *FLAGS, f"-march={march}", "-Werror", "-static", "-pthread", f"-I{SOURCES}"]
    subprocess.run([*command, SOURCES / "linear.cpp", PROGRAM, "-o", binary], check=True)
    emulated = [ARM_EMULATOR, "-cpu", "max", binary]
    done = subprocess.run(emulated, env={"OMP_NUM_THREADS": "2"}, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, isas), done.stderr
