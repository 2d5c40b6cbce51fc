"""JAX's persistent cache of compiled programs, shared by all processes of this machine.

A short check spends most of its time compiling the subject's functions for each shape, and by default JAX
does not cache programs that compile in under a second. Here all programs are cached:
https://docs.jax.dev/en/latest/persistent_compilation_cache.html
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import time
from pathlib import Path

VARIABLE = "BNVERIFY_CACHE"
WRONG = "0.5."
"""Releases of jaxlib whose cache may return a wrong program, so nothing is cached.

With 0.5.3 a cached loop over a large array makes no iteration (docs/findings.md); 0.4.38 and 0.6.2 are right.
"""
CPUINFO = Path("/proc/cpuinfo")
DAY = 86_400
UNUSED = 30 * DAY
"""Cached programs that no process has read for this many seconds are removed: each edit of a step leaves some."""


def cache_root() -> Path:
    """Return the directory of all caches of bnverify.

    ``BNVERIFY_CACHE`` if set, else ``bnverify`` in ``XDG_CACHE_HOME`` or ``~/.cache``.
    """
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bnverify"


def machine() -> str:
    """Return a short name of this processor; processors with the same name can share programs.

    XLA compiles for the processor that it runs on, but the key of a cached program in JAX does not
    include it: on a processor with other features the program may stop with an illegal instruction.
    This happens when machines share a home directory.
    """
    traits = [platform.system(), platform.machine(), platform.processor()]
    try:
        text = CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        text = ""
    for key in ("model name", "flags", "Features"):  # "Features" on Arm
        traits += [line for line in text.splitlines() if line.startswith(key)][:1]
    return hashlib.sha256("\n".join(traits).encode()).hexdigest()[:12]


def location(directory: str | os.PathLike[str] | None = None) -> Path:
    """Return the directory for compiled programs, one for each jaxlib and processor.

    Args:
        directory: the root; None: :func:`cache_root`.
    """
    jaxlib = importlib.metadata.version("jaxlib")
    root = cache_root() if directory is None else Path(directory)
    return root / "programs" / f"jaxlib-{jaxlib}-{machine()}"


def enable(directory: str | os.PathLike[str] | None = None) -> Path | None:
    """Make JAX cache every program that it compiles, and reuse those of other processes.

    It may be called before or after the first compilation, and by any number of processes at
    once on one directory.

    Args:
        directory: the root; None: :func:`cache_root`.

    Returns:
        The directory; None if it is not writable or the cache of this jaxlib is unreliable: then JAX
        compiles without a cache.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    if importlib.metadata.version("jaxlib").startswith(WRONG):
        return None
    path = location(directory)
    try:
        # 0o700: whoever can write a cached program can run code in every process that loads it.
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return None
    if not os.access(path, os.W_OK):
        return None
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # JAX decides whether it uses a cache at the first compilation: make it decide again.
    compilation_cache.reset_cache()
    remove_unused(path.parent)
    return path


def remove_unused(programs: Path) -> None:
    """Remove files that were not read or written for ``UNUSED`` seconds, for all releases, once a day.

    A file that another process has open stays readable to it; a missing one is compiled again. On a file
    system mounted with ``noatime``, only the time of writing counts.

    Args:
        programs: the directory of all releases' directories.
    """
    looked, now = programs / "looked-through", time.time()
    with contextlib.suppress(OSError):
        if looked.exists() and now - looked.stat().st_mtime < DAY:
            return
        looked.touch()
        for folder, _, names in os.walk(programs):
            for path in (Path(folder, name) for name in names):
                with contextlib.suppress(OSError):  # another process may have removed it
                    known = path.stat()
                    if now - max(known.st_atime, known.st_mtime) > UNUSED:
                        path.unlink()
