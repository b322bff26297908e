"""All mergers of the library with their usual strengths, as experiments on merging compare them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax

import subspace_jax as sj
from subspace_jax import merging
from subspace_jax.methods.merging.do_merging import do_merging
from subspace_jax.methods.merging.orthomerge import orthomerge

# A merger of experts and base: its usual strength, or None where it has none, and what it makes at a share of that one.
Arm = tuple[float | None, Callable[..., Any]]


def arms(kind: str, fishers: Any, grams: Any, side: Literal["in", "auto"] = "in") -> dict[str, Arm]:
    """Returns the mergers that apply to a kind of experts, by name.

    Args:
      kind: "lora", "oft" or "full".
      fishers: squared gradients of every expert, by path.
      grams: Gram matrices of every expert's inputs, by path.
      side: of matrices that OrthoMerge turns; "auto", the smaller one, where the other has more than a thousand.
    """
    key = jax.random.key(0)
    ties = functools.partial(merging.ties, density=0.2)
    found: dict[str, Arm] = {
        "task arithmetic": (0.3, functools.partial(merging.task_arithmetic, weights=0.3)),
        "TIES": (1.0, ties),
        "DARE + task arithmetic": (0.3, functools.partial(merging.dare, key=key)),
        "DARE + TIES": (1.0, functools.partial(merging.dare, key=key, merger=ties)),
        "TSV-M": (1.0, merging.tsv_m),
        "Iso-C": (1.0, merging.iso_c),
        "KnOTS + TIES": (0.6, functools.partial(merging.knots, merger=ties, scale=0.6)),
        "Fisher": (1.0, functools.partial(merging.fisher, statistics=fishers)),
        "RegMean": (1.0, functools.partial(merging.regmean, statistics=grams)),
        "decoupled": (1.0, functools.partial(do_merging, steps=0)),
    }
    if kind == "lora":
        found["DO-Merging"] = (1.0, do_merging)
    if kind == "oft":
        found["OrthoMerge"] = (None, orthomerge)
    else:
        turning = functools.partial(orthomerge, side=side)
        found["OrthoMerge + task arithmetic"] = (1.0, turning)
        found["OrthoMerge + TIES"] = (1.0, functools.partial(turning, merger=ties, targets="conflicts"))
    return found


def origin(merger: Callable[..., Any], experts: Sequence[Any], base: Any) -> Any:
    """Returns the tree from which a merger's strength counts: the base, or the merged rotation of it where one is."""
    turned = merger is orthomerge or (isinstance(merger, functools.partial) and merger.func is orthomerge)
    return sj.merge(merger(experts, base, scale=0.0)) if turned else base
