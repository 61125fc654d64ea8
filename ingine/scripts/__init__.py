"""Lua scripts: those that worker and producer share are here, the others in the `scripts` folder of each.

A script that has the line `-- include: NAME.lua` gets that file of this folder in its place.
"""

import re
from functools import cache
from importlib.resources import files

_INCLUDE = re.compile(r"^-- include: (\w+\.lua)$", re.MULTILINE)


@cache
def read_script(package: str, name: str) -> str:
    """The source of `<package>/scripts/<name>.lua`, as the server gets it."""
    source = (files(package) / "scripts" / f"{name}.lua").read_text()
    return _INCLUDE.sub(lambda found: (files(__name__) / found[1]).read_text(), source)
