"""Fuzz all outside input, with a target for each parser: `python -m benchmarks.fuzz --minutes 10`.

A target is a module with two functions. `cases(rng)` makes an input, as bytes: usually a damaged valid one.
`check(case)` parses it, and uses the result as ingine does. It returns the outcome in one word, for the
counts, and raises for a finding: any error that the parser does not document.

`tests/security/test_fuzz.py` runs a few cases of each.
"""
