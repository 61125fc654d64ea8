"""The Lua scripts of workers and producers: every operation on more than one key is one script.

In a script, the line `-- include: NAME.lua` stands for that file of this folder. Only `ingine.contract.calls`
reads scripts.
"""

import re
from functools import cache
from importlib.resources import files

_INCLUDE = re.compile(r"^-- include: (\w+\.lua)$", re.MULTILINE)


@cache
def read_script(name: str) -> str:
    """Return the source of `<name>.lua` as it is sent to the server, with the files that it includes."""
    source = (files(__name__) / f"{name}.lua").read_text()
    return _INCLUDE.sub(lambda found: (files(__name__) / found[1]).read_text(), source)
