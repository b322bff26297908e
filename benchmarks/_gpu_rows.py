"""What both processes of `gpu` share: shapes, the task they get, how a step is timed, and how rows are printed."""

from __future__ import annotations

import dataclasses
import gc
import json
import statistics
import time
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a Llama and of its batch.

    Attributes:
      width: of the residual stream.
      layers: of the model; more than four are scanned.
      heads: of the queries.
      kv_heads: of keys and values.
      mlp_width: inside the feed-forward part.
      vocabulary: token ids; the table is tied.
      batch: sequences.
      length: tokens of each.
      remat: whether layers are recomputed in the backward pass, in both libraries.
    """

    width: int
    layers: int
    heads: int
    kv_heads: int
    mlp_width: int
    vocabulary: int
    batch: int
    length: int
    remat: bool


# Llama 3.2 1B with a vocabulary of 32,000; the last one shows on any machine that the command runs.
SHAPES = {
    "1B-8x1024": Shape(2048, 16, 32, 8, 8192, 32000, 8, 1024, True),
    "160M-16x128": Shape(768, 12, 12, 12, 3072, 32000, 16, 128, False),
    "1B-1x512": Shape(2048, 16, 32, 8, 8192, 32000, 1, 512, False),
    "tiny": Shape(64, 2, 4, 2, 128, 97, 2, 16, True),
}

# A variant is a method, with or without one of three options behind it.
PLUS = " + "
FLASH = "flash attention"
JOINED = "joined products"
COMPILE = "torch.compile"
LEARNING_RATE = 1e-4
BLOCK_SIZE = 32  # of OFT


@dataclasses.dataclass(frozen=True)
class Task:
    """What one process measures.

    Attributes:
      shape: one of `SHAPES`.
      variants: one row each, in this order.
      rank: of the adapters.
      seconds: for which each is timed.
    """

    shape: str
    variants: tuple[str, ...]
    rank: int
    seconds: float

    def text(self) -> str:
        """Returns the task as one argument of a command."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def read(cls, text: str) -> Task:
        """Returns the task of `text`."""
        fields = json.loads(text)
        return cls(**{**fields, "variants": tuple(fields["variants"])})


class AbsentError(Exception):
    """What a row needs is not on this machine; the message says what."""


def print_rows(task: Task, measure: Callable[[str], dict[str, Any]]) -> None:
    """Prints a row of JSON for every variant as soon as it is there; one that fails is a row with its error."""
    for variant in task.variants:
        try:
            row = measure(variant)
        except AbsentError as absent:
            row = {"absent": str(absent)}
        except Exception as error:  # whatever it is, the others go on
            row = {"error": f"{type(error).__name__}: {str(error)[:600]}"}
        print(json.dumps({"variant": variant, **row}), flush=True)
        gc.collect()  # a cycle may hold a model's memory


def timed(step: Callable[[], Any], wait: Callable[[], Any], seconds: float) -> list[float]:
    """Returns the times of some steps, each waited for: about `seconds` of them, from 5 to 60, after three others."""
    for _ in range(3):
        step()
    wait()
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 5 or (time.perf_counter() - start < seconds and len(times) < 60):
        began = time.perf_counter()
        step()
        wait()
        times.append(time.perf_counter() - began)
    return times


def timing(times: list[float], tokens: int) -> dict[str, Any]:
    """Returns the figures of a row that are made of its times."""
    median = statistics.median(times)
    spread = 1e3 * (max(times) - min(times))
    return {"step_ms": 1e3 * median, "spread_ms": spread, "steps": len(times), "tokens_per_s": tokens / median}
