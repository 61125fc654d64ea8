"""A pytest plugin that makes a newer CPU behave as one whose widest instructions are AVX2.

    PYTHONPATH=. make test ARGS="-p tests.avx2 tests/engine"

Native kernels are compiled for AVX2, torch uses nothing wider, and it multiplies bfloat16 without oneDNN. The
last does not apply to programs that tests start.
"""

import os
import subprocess
import sys


def compile_for_avx2(command: list[str]) -> int:
    """Run a compiler's command, for AVX2 instead of this machine's CPU."""
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
