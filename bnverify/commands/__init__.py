"""The subcommands, one module each, named like the command.

A module has ``add_parser(subparsers)``, which adds its parser, and ``run(args) -> int``, which
returns the exit status and raises ``bnverify.errors.UsageError`` for input that it cannot use.
Every command imports all of these modules, so none imports jax, Hypothesis or rich before ``run``.
"""
