"""The version of the library that enforces grammars.

Two versions may allow different tokens at the same place, see docs/engine/structured-output.md.
"""

from importlib.metadata import version

LLGUIDANCE_VERSION = version("llguidance")
