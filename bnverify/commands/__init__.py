"""The commands, one module each: the module's name is the command's.

A module has ``add_parser(subparsers)``, which adds the parser of that name with its arguments, and
``run(args) -> int``, which returns the exit status and raises ``bnverify.errors.UsageError`` for what
it cannot work with. All of them are imported whenever any runs, so none imports jax, Hypothesis or
rich before ``run``.
"""
