"""Between two library versions: what moved, and whether it is rounding or meaning.

The data's way: `environments` (what `--from` and `--to` name, made by `uv`) -> `record` in each, by
`gate` or `bisect` -> `recording` (the file) -> `compare` -> `policy` -> `judgement`. Only `record` and
what it calls import jax; nothing is imported here.
"""
