"""Environments to record in: built from a requirement, cached, on the Python that it needs.

    old, new = build_all([parse("pins/jax-0.4.38.txt"), parse("latest")], project=Path("."))
    run(old, ["-m", "bnverify", "record", "-o", "old.bnv"])

An environment is made by uv from exact pins, with hard links into uv's cache, and kept under a hash
of the pins and the Python. bnverify and the user's project are layers on PYTHONPATH: see `layers`.
Whatever interrupts a build, the next one starts over or finds it done: see `store`, `supervisor`.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bnverify import compile_cache
from bnverify.upgrade import processes, releases, uv
from bnverify.upgrade.isolation import isolated
from bnverify.upgrade.layers import Project, bnverify_itself
from bnverify.upgrade.processes import CancelledError, Token
from bnverify.upgrade.requirements import EnvironmentUnavailableError, parse
from bnverify.upgrade.store import Store
from bnverify.upgrade.trees import TreeError

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Mapping, Sequence

    from bnverify.upgrade.requirements import Requirement

__all__ = ["Environment", "EnvironmentUnavailableError", "build", "build_all", "parse", "run"]

_UV_SECONDS = 1800  # for one command of uv: half a gigabyte over a slow line


@dataclass(frozen=True)
class Environment:
    """A Python with releases to record in.

    Attributes:
        requirement: as the user wrote it.
        python: the interpreter.
        python_version: as 3.11.7.
        versions: of every distribution installed, by normalised name.
        paths: directories to import from before the environment's own.
        key: a hash of all that decides what runs: releases, Python, bnverify, project.
        seconds: that getting it took.
    """

    requirement: str
    python: Path
    python_version: str
    versions: Mapping[str, str]
    paths: tuple[Path, ...]
    key: str
    seconds: float


def build(
    requirement: Requirement,
    project: Path | None = None,
    extra_paths: Sequence[Path] = (),
    cache_dir: Path | None = None,
    token: Token | None = None,
) -> Environment:
    """Return an environment that holds what the requirement asks for, made if need be.

    Args:
        requirement: from `parse`.
        project: a directory with a pyproject.toml or setup.py, to build and import from; its
            dependencies are added, the requirement's releases overriding its own bounds on them.
            Any other directory is imported from as it lies.
        extra_paths: directories to import from after the project.
        cache_dir: by default what `compile_cache.cache_root` says.
        token: lets another thread give this up.

    Raises:
        EnvironmentUnavailableError: it cannot be resolved, built or imported.
        CancelledError: the token was cancelled.
    """
    if os.name != "posix":  # pragma: no cover -- no locks that die with their holder, no killpg
        raise _unavailable(requirement, "that takes Linux or macOS; on Windows use WSL")
    try:
        return _build(requirement, project, extra_paths, _store(cache_dir), token or Token())
    except uv.UvError as error:
        raise _unavailable(requirement, f"uv says\n{error}\nLikely mend: {error.mend}") from None
    except (EnvironmentUnavailableError, TreeError) as error:
        raise _unavailable(requirement, str(error)) from None
    except OSError as error:
        mend = "let BNVERIFY_CACHE name a directory on a local disk that has room"
        raise _unavailable(requirement, f"{error}\nLikely mend: {mend}") from None


def build_all(
    requirements: Sequence[Requirement],
    project: Path | None = None,
    extra_paths: Sequence[Path] = (),
    cache_dir: Path | None = None,
) -> list[Environment]:
    """Return the environments of all requirements, made in parallel; arguments as for `build`.

    When one cannot be had, or on Ctrl-C, the others are given up, and nothing goes on running.

    Raises:
        EnvironmentUnavailableError: for the first of the requirements that cannot be had.
    """
    _sweep(cache_dir)
    token = Token()
    with ThreadPoolExecutor(max(1, len(requirements))) as pool:
        futures = [
            pool.submit(build, requirement, project, extra_paths, cache_dir, token)
            for requirement in requirements
        ]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            token.cancel()
    for future in futures:
        if not isinstance(future.exception(), CancelledError):
            future.result()
    return [future.result() for future in futures]


def run(
    environment: Environment,
    arguments: Sequence[str],
    *,
    timeout: float | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    token: Token | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run the environment's Python, and return its status and what it printed.

    It sees its own releases, bnverify and the project; no user site, no PYTHONPATH of this process
    and, from Python 3.11, no current directory. What configures jax passes through.

    Args:
        environment: from `build`.
        arguments: of Python, as `["-m", "bnverify", ...]`.
        timeout: seconds.
        env: variables to set beside.
        cwd: the directory to run in.
        token: lets another thread end it.

    Raises:
        subprocess.TimeoutExpired: it ran for longer.
        CancelledError: the token was cancelled.
    """
    return processes.run(
        [str(environment.python), *arguments],
        env=isolated(environment.paths, env),
        cwd=cwd,
        timeout=timeout,
        token=token,
    )


def _build(
    requirement: Requirement,
    project: Path | None,
    extra_paths: Sequence[Path],
    store: Store,
    token: Token,
) -> Environment:
    started = time.monotonic()
    sources = Project(project) if project else None
    own, own_key = bnverify_itself(store, token)
    paths = [own]
    with store.scratch() as work:
        tool = uv.Uv(work, requirement.directory, token, _UV_SECONDS)
        if requirement.kind == "python":
            found = releases.there(requirement, token)
        else:
            found = releases.install(requirement, sources, store, tool)
        if sources and sources.builds:
            tag = "-".join([*found.version.split(".")[:2], platform.machine()])
            paths.append(sources.layer(store, tool, found.python, tag))
        elif sources:
            paths += sources.places()
    paths += [path.absolute() for path in extra_paths]
    decisive = [found.key, own_key, sources and sources.key, [str(path) for path in paths]]
    return Environment(
        requirement=requirement.text,
        python=found.python,
        python_version=found.version,
        versions=found.versions,
        paths=tuple(paths),
        key=hashlib.sha256(json.dumps(decisive).encode()).hexdigest(),
        seconds=time.monotonic() - started,
    )


def _store(cache_dir: Path | None) -> Store:
    return Store((cache_dir or compile_cache.cache_root()).absolute() / "upgrade")


def _sweep(cache_dir: Path | None) -> None:
    try:
        _store(cache_dir).sweep()
    except OSError:
        return  # a cache that cannot be written is `build`'s to report


def _unavailable(requirement: Requirement, why: str) -> EnvironmentUnavailableError:
    return EnvironmentUnavailableError(f"cannot make the environment {requirement.text}: {why}")
