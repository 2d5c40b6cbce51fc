"""Between two library versions: what moved, and whether it is rounding or meaning.

Nothing is imported here. `recording_file` must load in an environment of 2023 that has numpy and
little else; `environments` and `policy` need only the standard library.
"""
