"""How DoRAs are merged without forming them: their sum is a DoRA."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from subspace_jax.merging import Factored, Form, low_rank, read_change, register_form
from subspace_jax.methods.low_rank.dora._weight import Magnitude

# A column that the sum takes out of the base almost whole is no base column of another length.
SMALLEST = 1e-3


def read(path: str, weight: Magnitude, base: Any) -> Factored | None:
    r"""Returns \((W_0 + a b)\,\mathrm{diag}(f) - W_0\) as \(W_0\,\mathrm{diag}(f - 1) + a\,(b\,\mathrm{diag}(f))\)."""
    inner = read_change(path, weight.direction, base)
    if not isinstance(inner, Factored) or inner.gain is not None:
        return None
    factors = weight.factors()
    return dataclasses.replace(inner, b=inner.b * factors[..., None, :], gain=factors - 1.0)


def write(base: Any, change: Factored) -> Magnitude | None:
    r"""Returns the DoRA of \(W_0\,\mathrm{diag}(f) + a b\): its direction is \(W_0 + a\,(b\,\mathrm{diag}(1/f))\)."""
    factors = 1.0 + change.gain if change.gain is not None else jnp.ones(change.b.shape[-1:], change.b.dtype)
    vanishes = jnp.min(jnp.abs(factors)) < SMALLEST
    if not isinstance(vanishes, Tracer) and bool(vanishes):
        return None
    direction = low_rank(base, dataclasses.replace(change, b=change.b / factors[..., None, :], gain=None))
    return Magnitude(
        direction=direction,
        magnitude=factors * jnp.sqrt(direction.squared_norms()),
        role=change.role,
        dtype=np.dtype(base.dtype),
        trainable=("magnitude",),
        method="dora(lora)",
    )


register_form(Magnitude, Form(read, write))
