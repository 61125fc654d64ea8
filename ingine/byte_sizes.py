"""Parses sizes in bytes, such as 2147483648, 2GB or 2GiB."""

import re
from decimal import Decimal
from typing import Any

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?)b?|b)?", re.IGNORECASE | re.ASCII)
_EXPONENTS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_bytes(value: Any) -> Any:
    """Convert text to a number of bytes. k, M, G and T are powers of 1000; Ki, Mi, Gi and Ti of 1024. A B may
    follow; case is ignored. A value that is not text is returned unchanged. Raises ValueError.
    """
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value.strip().replace("_", ""))
    if match is None:
        raise ValueError("must be a number of bytes, such as 2000000000, 2GB (of 1000) or 2GiB (of 1024)")
    number, unit, binary = match.groups()
    scale = (1024 if binary else 1000) ** _EXPONENTS[(unit or "").lower()]
    return int(Decimal(number) * scale)
