"""Runs the processes of `gpu` within a limit of time, and says what became of every row."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

NO_TIME = "no time was left"
# A process that has less would hardly come to its first step.
LEAST_SECONDS = 15.0

Row = dict[str, Any]
# Of a pair, its variants and seconds: the rows that came, and why the others did not, or None if all did.
Start = Callable[["Pair", Sequence[str], float], tuple[list[Row], str | None]]


@dataclasses.dataclass(frozen=True)
class Pair:
    """A shape and a library, which have processes of their own, and their rows.

    Attributes:
      shape: its name.
      library: whose steps.
      variants: one row each.
    """

    shape: str
    library: str
    variants: tuple[str, ...]


@dataclasses.dataclass
class Collected:
    """What all processes found.

    Attributes:
      rows: figures or an error for a variant.
      left_out: a reason for a variant.
    """

    rows: list[Row] = dataclasses.field(default_factory=list)
    left_out: list[Row] = dataclasses.field(default_factory=list)


def read_rows(command: Sequence[str], seconds: float, extra: Mapping[str, str]) -> tuple[list[Row], str | None]:
    """Runs a command that prints rows of JSON, and ends it with all its children when its time is over.

    Args:
      command: what is run, in the folder of the repository.
      seconds: for how long.
      extra: environment variables beside this process's, where they are not set.

    Returns:
      The rows that came; None if it ended well, `NO_TIME`, or how it ended with the end of what it said.
    """
    environment = {**extra, **os.environ}
    # A session of its own, so that a compiler's workers, which hold the pipe open, end with it.
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parents[1],
        env=environment,
        start_new_session=True,
    )
    late = False
    try:
        printed, said = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        late = True
        os.killpg(process.pid, signal.SIGKILL)
        printed, said = process.communicate()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    lines = printed.decode(errors="replace").splitlines(keepends=True)
    rows = [json.loads(line) for line in lines if line.startswith('{"variant"') and line.endswith("\n")]
    if late:
        return rows, NO_TIME
    if process.returncode == 0:
        return rows, None
    return rows, f"the process ended with {process.returncode}: {said.decode(errors='replace').strip()[-400:]}"


def collect(
    pairs: Sequence[Pair], limit_seconds: float, start: Start, clock: Callable[[], float] = time.monotonic
) -> Collected:
    """Gives every pair its share of the time, then what is left over to those whose share was too short.

    A process that dies takes the row that it was at with it, which becomes one with its error; another goes on with the
    rows behind it.

    Args:
      pairs: in their order.
      limit_seconds: for all of them.
      start: runs one process.
      clock: seconds.

    Returns:
      A row or a reason for every variant of every pair.
    """
    found, end = Collected(), clock() + limit_seconds
    waiting = list(pairs)
    for _ in range(2):
        pending, waiting = waiting, []
        while pending:
            pair = pending.pop(0)
            share = len(pair.variants) / (len(pair.variants) + sum(len(p.variants) for p in pending))
            until = clock() + max(share * (end - clock()), min(LEAST_SECONDS, end - clock()))
            rest = _run_pair(pair, until, start, clock, found)
            if rest:
                waiting.append(dataclasses.replace(pair, variants=rest))
    for pair in waiting:
        found.left_out += [_row(pair, {"variant": variant, "reason": NO_TIME}) for variant in pair.variants]
    return found


def _run_pair(pair: Pair, until: float, start: Start, clock: Callable[[], float], found: Collected) -> tuple[str, ...]:
    """Runs a pair's processes; returns the variants that there was no time for."""
    rest = pair.variants
    while rest and until - clock() >= LEAST_SECONDS:
        rows, ending = start(pair, rest, until - clock())
        for row in rows:
            if "absent" in row:
                found.left_out.append(_row(pair, {"variant": row["variant"], "reason": row["absent"]}))
            else:
                found.rows.append(_row(pair, row))
        came = {row["variant"] for row in rows}
        rest = tuple(variant for variant in rest if variant not in came)
        if ending == NO_TIME:
            break
        if rest:
            error = ending or "the process ended without this row"
            found.rows.append(_row(pair, {"variant": rest[0], "error": error}))
            rest = rest[1:]
    return rest


def _row(pair: Pair, row: Row) -> Row:
    return {"shape": pair.shape, "library": pair.library, **row}
