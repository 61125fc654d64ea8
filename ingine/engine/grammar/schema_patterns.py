"""What the library reads otherwise in a schema's regular expressions than validators do."""

import re

_ELEMENT = re.compile(r"\\[dDwWsS]|\\.|\[|\]|&&|--|~~|.", re.S)
_CONTROL = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")
"""The characters that JSON can only write as \\uXXXX, and DEL, which the library writes so too."""
_NAMED_CONTROL = re.compile(r"\\[0acev]|\\x[01][0-9a-fA-F]|\\x7[fF]|\\u00(?:[01]|7[fF])|\\[xu]\{")

WITHOUT_CONTROL = r"^[^\x00-\x07\x0b\x0e-\x1f\x7f]*$"


def has_control(text: str) -> bool:
    return bool(_CONTROL.search(text))


def names_control(pattern: str) -> bool:
    """Whether such a character stands in a pattern, which may then need it."""
    return bool(_CONTROL.search(pattern) or _NAMED_CONTROL.search(pattern))


def pattern_fault(pattern: str) -> str | None:
    """Name a construct that would allow more than ECMA 262 or Python do, None if there is none.

    A class in a class and set operators are the library's alone. \\W, \\D and negated classes with \\w or \\d
    depend on whether letters and digits beyond ASCII count: they do in Python, and not in ECMA 262.
    """
    in_class = negated = False
    position = 0
    while position < len(pattern):
        element = _ELEMENT.match(pattern, position)[0]
        position += len(element)
        if not in_class:
            if element == "[":
                in_class, negated = True, pattern.startswith("^", position)
                position += negated
                position += pattern.startswith("]", position)
            elif element in (r"\W", r"\D"):
                return element
        elif element == "]":
            in_class = False
        elif element == "[":
            return "[ in a class"
        elif element in ("&&", "--", "~~") and negated:
            return f"{element} in a negated class"
        elif element in ((r"\w", r"\d") if negated else (r"\W", r"\D")):
            return f"{element} in a {'negated ' * negated}class"
    return None
