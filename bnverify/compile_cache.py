"""JAX's own cache of compiled programs, for all processes of this machine.

Most of the time of a short check goes into compiling the subject's functions for each shape, and by
default JAX keeps no program that took under a second. Here it keeps all, where every process finds
them: https://docs.jax.dev/en/latest/persistent_compilation_cache.html
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
"""Releases of jaxlib of which a program is another once it comes from the cache: none is kept.

With 0.5.3 a loop over a large array then never turns (docs/findings.md); with 0.4.38 and 0.6.2 it does.
"""
CPUINFO = Path("/proc/cpuinfo")
DAY = 86_400
UNUSED = 30 * DAY
"""Seconds after which a kept file that nobody read is removed. Each edit of a step leaves its programs."""


def cache_root() -> Path:
    """Return the directory of everything bnverify caches.

    ``BNVERIFY_CACHE`` if set, else ``bnverify`` in ``XDG_CACHE_HOME`` or ``~/.cache``.
    """
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bnverify"


def machine() -> str:
    """Return a short name of this processor: equal names can run each other's programs.

    XLA compiles for the very processor it runs on, and JAX does not put that into the name of
    a cached program: on a processor with other features it may stop with an illegal
    instruction. A home directory shared between machines makes that real.
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
    """Return where compiled programs belong: one directory for each jaxlib and processor.

    Args:
        directory: what to use in the place of :func:`cache_root`.
    """
    jaxlib = importlib.metadata.version("jaxlib")
    root = cache_root() if directory is None else Path(directory)
    return root / "programs" / f"jaxlib-{jaxlib}-{machine()}"


def enable(directory: str | os.PathLike[str] | None = None) -> Path | None:
    """Let JAX keep every program it compiles, and find those that other processes kept.

    It may be called before or after the first compilation, and by any number of processes at
    once on one directory.

    Args:
        directory: what to use in the place of :func:`cache_root`.

    Returns:
        The directory; None where it cannot be written, or jaxlib cannot be trusted with it, and
        JAX compiles as if not asked.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    if importlib.metadata.version("jaxlib").startswith(WRONG):
        return None
    path = location(directory)
    try:
        # 0o700: who can write a cached program can run code in every process that loads it.
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return None
    if not os.access(path, os.W_OK):
        return None
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # JAX decides once whether it has a cache, at the first compilation: let it decide again.
    compilation_cache.reset_cache()
    remove_unused(path.parent)
    return path


def remove_unused(programs: Path) -> None:
    """Remove what was not read or written for ``UNUSED`` seconds, for all releases, once a day.

    A file that another process has open stays readable to it; one that it then does not find, it
    makes again. Where reading is not recorded (a file system mounted ``noatime``), the age counts.

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
                with contextlib.suppress(OSError):  # another process removes, too
                    known = path.stat()
                    if now - max(known.st_atime, known.st_mtime) > UNUSED:
                        path.unlink()
