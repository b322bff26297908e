"""What a step costs: operations and bytes as the compiler counts them, seconds of tracing, compiling, running."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks._variants import Variant


@dataclasses.dataclass(frozen=True)
class Cost:
    """What the compiler says of one program.

    Attributes:
      flops: `cost_analysis()` of the compiled program. The body of a scan is counted once, whatever its length.
      temporary_bytes: temporaries and outputs together, since temporaries may lie in the outputs' memory.
      argument_bytes: bytes of the arguments.
      lower_seconds: tracing and lowering.
      compile_seconds: compiling.
      transposes: transposes in the optimized program.
      copies: copies in it.
    """

    flops: float
    temporary_bytes: int
    argument_bytes: int
    lower_seconds: float
    compile_seconds: float
    transposes: int
    copies: int


def shapes(tree: Any) -> Any:
    """Returns the tree with a shape in place of every array."""
    return jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), tree)


def cost(function: Callable[..., Any], arguments: Sequence[Any], **options: Any) -> tuple[Cost, Any]:
    """Compiles a function for arguments, or shapes, and reads what the compiler says.

    Args:
      function: called with `arguments`; traced anew.
      arguments: arrays or shapes.
      **options: of `jax.jit`.

    Returns:
      The cost, and the compiled program.
    """
    start = time.perf_counter()
    # A new function object, so that no earlier trace of it is reused.
    lowered = jax.jit(lambda *values: function(*values), **options).lower(*arguments)
    traced = time.perf_counter()
    compiled = lowered.compile()
    ended = time.perf_counter()
    memory: Any = compiled.memory_analysis()
    text = compiled.as_text() or ""
    analysis: Any = compiled.cost_analysis()
    result = Cost(
        flops=float(analysis["flops"]),
        temporary_bytes=memory.temp_size_in_bytes + memory.output_size_in_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        lower_seconds=traced - start,
        compile_seconds=ended - traced,
        transposes=text.count(" transpose("),
        copies=text.count(" copy("),
    )
    return result, compiled


def step_cost(variant: Variant, tokens: Any, *, bare: bool = False, donate: bool = False) -> tuple[Cost, Any]:
    """Returns the cost and the program of a training step.

    Args:
      variant: what to train.
      tokens: a batch, or its shape.
      bare: leave out the global-norm clip and the logged gradient norm.
      donate: donate the buffers of the learned arrays and the state to the outputs.
    """
    learned = shapes(variant.learned)
    state = jax.eval_shape(variant.optimizer(bare=bare).init, learned)
    arguments = (learned, state, shapes(variant.fixed), shapes(tokens))
    options = {"donate_argnums": (0, 1)} if donate else {}
    return cost(variant.step(bare=bare), arguments, **options)


def forward_cost(variant: Variant, tokens: Any) -> Cost:
    """Returns the cost of inference."""
    arguments = (shapes(variant.learned), shapes(variant.fixed), shapes(tokens))
    return cost(variant.forward, arguments)[0]


class Runner:
    """Runs one variant's compiled steps, each from where the last one ended."""

    def __init__(self, variant: Variant, tokens: jax.Array):
        _, self.step = step_cost(variant, tokens, donate=True)
        # Donated arrays are consumed, and variants share the base.
        self.learned = jax.tree.map(jnp.copy, variant.learned)
        self.state = jax.jit(variant.optimizer().init)(self.learned)
        self.fixed, self.tokens = variant.fixed, tokens
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def run(self) -> None:
        """Runs and times one step."""
        start = time.perf_counter()
        self.learned, self.state, loss, _ = self.step(self.learned, self.state, self.fixed, self.tokens)
        self.losses.append(float(loss))
        self.seconds.append(time.perf_counter() - start)


def fastest(function: Callable[[], Any], rounds: int) -> float:
    """Returns the seconds of the fastest of some calls, after one that compiles.

    Args:
      function: returns arrays, which are waited for.
      rounds: timed calls.
    """
    seconds = []
    for _ in range(1 + rounds):
        start = time.perf_counter()
        jax.block_until_ready(function())
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def interleaved(runners: Sequence[Any], rounds: int) -> None:
    """Runs every runner once a round, so that what slows the machine down slows all alike.

    The first round warms up and is dropped.
    """
    for i in range(rounds + 1):
        for runner in runners:
            runner.run()
            if i == 0:
                runner.seconds.clear()


def combined(costs: Sequence[Cost]) -> dict[str, Any]:
    """Returns the counts of several compilations of one program, which are equal, with the median times."""
    values = dataclasses.asdict(costs[0])
    for name in ("lower_seconds", "compile_seconds"):
        values[name] = statistics.median(getattr(c, name) for c in costs)
    return values


def build_seconds(costs: Sequence[Cost]) -> list[float]:
    """Returns the time from the function to the compiled program, of every compilation."""
    return [c.lower_seconds + c.compile_seconds for c in costs]


def paired_ratio(seconds: Sequence[float], reference: Sequence[float]) -> float:
    """Returns the median over rounds of one variant's time divided by another's in the same round."""
    return statistics.median(a / b for a, b in zip(seconds, reference, strict=True))
