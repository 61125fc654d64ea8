import subprocess
import sys

from ingine import producer


def test_everything_exported_exists():
    assert sorted(producer.__all__) == producer.__all__
    assert all(hasattr(producer, name) for name in producer.__all__)


def test_a_producer_needs_neither_torch_nor_the_worker():
    program = "import ingine.producer, ingine.cli.producer, sys; print(*sys.modules)"
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    imported = set(finished.stdout.split())
    assert "ingine.producer" in imported
    assert not imported & {"torch", "transformers", "numpy", "ingine.worker", "ingine.engine"}
