"""Detects that this run is about to be stopped: SIGTERM, here or on another host of the pod."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils


class Preemption:
    """Context manager that listens for SIGTERM.

    On one process the signal only sets a mark, and the handler that was there before comes back at the end. Of several
    processes JAX's own service listens; it makes all of them stop after the same step, whichever got the signal.
    """

    def __init__(self) -> None:
        self._told = False
        self._listens = False
        self._before: Any = None
        self._several = jax.distributed.is_initialized()

    def __enter__(self) -> Preemption:
        # Only the main thread may set handlers; in another one the caller's own remains.
        if not self._several and threading.current_thread() is threading.main_thread():
            self._before, self._listens = signal.signal(signal.SIGTERM, self._mark), True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._listens:
            signal.signal(signal.SIGTERM, signal.SIG_DFL if self._before is None else self._before)

    def _mark(self, number: int, frame: FrameType | None) -> None:
        self._told = True

    def due(self, step: int) -> bool:
        """Returns whether to save and stop after this step; called after every step, in every process."""
        if not self._several or not getattr(jax.config, "jax_enable_preemption_service", True):
            return self._told
        return multihost_utils.reached_preemption_sync_point(step)
