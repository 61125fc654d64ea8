"""Halves of UTF-16 surrogate pairs, which a str may hold and UTF-8 cannot encode."""


def without_surrogates(text: str) -> str:
    """Join surrogate pairs, and replace lone surrogates."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
