"""The learning rate of a run, counted in optimizer steps."""

from __future__ import annotations

import optax

from ._options import FinetuneOptions


def make_schedule(options: FinetuneOptions, rate: float, steps: int) -> optax.Schedule:
    """Returns the learning rate by optimizer steps: a linear rise, then the chosen fall to zero, or none."""
    warmup = min(round(options.warmup * steps), steps - 1)
    if options.schedule == "constant":
        fall: optax.Schedule = optax.constant_schedule(rate)
    elif options.schedule == "linear":
        fall = optax.linear_schedule(rate, 0.0, steps - warmup)
    else:
        fall = optax.cosine_decay_schedule(rate, steps - warmup)
    if not warmup:
        return fall
    # The first step has a rate above zero: one that moved nothing would be wasted.
    rise = optax.linear_schedule(rate / warmup, rate, max(1, warmup - 1))
    return optax.join_schedules([rise, fall], [warmup])
