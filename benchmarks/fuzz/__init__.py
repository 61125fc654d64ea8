"""Fuzz what comes from outside, with a target for each parser: `python -m benchmarks.fuzz --minutes 10`.

A target is a module with two functions. `cases(rng)` makes an input, as bytes: a valid one that has been
damaged, most of the time. `check(case)` parses it, and goes on with it as ingine does; it returns in a word
what came of it, for the counts, and raises for a finding: any error but those that the parser documents.

`tests/security/test_fuzz.py` runs a few cases of each.
"""
