"""Makes the files that a fake system reads instead of a model.

Arguments are MODEL PATH KIND, as for real ones.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    model, path, kind = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    if kind == "impossible":
        sys.exit("no such weights")
    assert not path.exists()
    path.write_text(f"{kind} of {model}, once")
