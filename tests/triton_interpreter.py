"""Speeds up Triton's interpreter, which runs the kernels for GPUs on a CPU.

It replaces some 300 functions of `triton.language` at every launch and at every call between kernel
functions, which takes a fifth of the time of small shapes. In tests they stay replaced.
"""

from typing import Any


def keep_patched() -> None:
    """Keep the functions replaced. Only for a process in which no kernel is compiled."""
    from triton.runtime import interpreter

    patch, patched, tl = interpreter._patch_lang, {}, interpreter.tl

    def patch_once(fn: Any) -> Any:
        """Call `patch` once for each module through which a function sees the language."""
        values = fn.__globals__.values()
        languages = tuple(any(value is language for value in values) for language in (tl, tl.core))
        if languages not in patched:
            patched[languages] = type(patch(fn))
        return patched[languages]()  # a scope with nothing to restore

    interpreter._patch_lang = patch_once
