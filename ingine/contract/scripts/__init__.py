"""The Lua scripts of workers and producers: all that touches more than one key at once.

A script that has the line `-- include: NAME.lua` gets that file of this folder in its place.
"""

import re
from functools import cache
from importlib.resources import files

_INCLUDE = re.compile(r"^-- include: (\w+\.lua)$", re.MULTILINE)


@cache
def read_script(name: str) -> str:
    """The source of `<name>.lua`, as the server gets it."""
    source = (files(__name__) / f"{name}.lua").read_text()
    return _INCLUDE.sub(lambda found: (files(__name__) / found[1]).read_text(), source)
