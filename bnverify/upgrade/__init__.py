"""What changed between two sets of library versions, and whether it is rounding or meaning.

Data flow: `environments` (what `--from` and `--to` name, created by `uv`) -> `record` in each, run
by `gate` or `bisect` -> `recording` (the file) -> `compare` -> `policy` (the judgement). Only
`record` and the modules it uses import jax; nothing is imported here.
"""
