"""A pytest plugin: a newer CPU passes for one that has AVX2 and nothing newer.

    PYTHONPATH=. make test ARGS="-p tests.avx2 tests/engine"

Native kernels are compiled for AVX2, torch uses no more than that, and multiplies bfloat16 without oneDNN. In
programs that tests start the last of these does not hold.
"""

import os
import subprocess
import sys


def compile_for_avx2(command: list[str]) -> int:
    """Run a compiler's command for AVX2 where it is for this machine."""
    command = ["-march=x86-64-v3" if word == "-march=native" else word for word in command]
    return subprocess.run(command).returncode


if __name__ == "__main__":
    sys.exit(compile_for_avx2(sys.argv[1:]))

os.environ["CXX"] = f"{sys.executable} {os.path.abspath(__file__)} {os.environ.get('CXX') or 'g++'}"
os.environ["ATEN_CPU_CAPABILITY"] = "avx2"

import torch  # noqa: E402 (reads the environment)

from ingine.engine.kernels.layers import onednn  # noqa: E402

torch.backends.mkldnn.set_flags(False)
torch.cpu._is_vnni_supported = lambda: False
onednn.bfloat16_is_packable = lambda: False
