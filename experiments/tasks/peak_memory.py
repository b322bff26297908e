"""How long a call takes, and how far the memory of the process rises in it."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def measured(make: Callable[[], Any]) -> tuple[Any, float, int | None]:
    """Calls a function and waits for the arrays of what it returns.

    Args:
      make: what is called.

    Returns:
      What it returned, its seconds, and the bytes by which the resident memory rose at most above that before the call;
      None where the system does not tell. Programs that are compiled meanwhile count in both: the second call tells.
    """
    gc.collect()
    before = _resident("VmRSS") if _reset() else None
    start = time.perf_counter()
    made = make()
    jax.block_until_ready(jax.tree.leaves(made))
    seconds = time.perf_counter() - start
    after = None if before is None else _resident("VmHWM")
    return made, seconds, None if before is None or after is None else max(0, after - before)


def _reset() -> bool:
    """Sets the highest mark to what is resident now; Linux lets a process do that to itself."""
    try:
        _RESET.write_text("5")
    except OSError:
        return False
    return True


def _resident(name: str) -> int | None:
    found = [line for line in _STATUS.read_text().splitlines() if line.startswith(name)]
    return 1024 * int(found[0].split()[1]) if found else None
