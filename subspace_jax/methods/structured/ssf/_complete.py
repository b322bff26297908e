"""Gives norms the scale or bias that they lack, so that `ssf` can scale and shift after them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import jax.numpy as jnp

from subspace_jax.core import Params, PatternError, PyTree, matches, nearest


def complete_norms(params: Params, norms: str | Iterable[str]) -> Params:
    """Returns the parameters with a bias of zeros or a scale of ones in norms that have only the other.

    For the model with `use_bias=True` and `use_scale=True` in those norms, which then computes what it did before.

    Args:
      params: a tree of dicts.
      norms: globs over the paths of the norms' dicts, such as "**/norm".

    Returns:
      The tree with the new entries.

    Raises:
      PatternError: a glob matches no dict with a scale or a bias.

    Example:
      >>> import jax.numpy as jnp, subspace_jax as sj
      >>> params = {"block": {"norm": {"scale": jnp.ones(4)}, "other": {"scale": jnp.ones(4)}}}
      >>> sorted(sj.methods.ssf.complete_norms(params, "**/norm")["block"]["norm"])
      ['bias', 'scale']
    """
    patterns = [norms] if isinstance(norms, str) else list(norms)
    found: dict[str, str] = {}
    unmatched = set(patterns)

    def visit(tree: PyTree, path: str) -> PyTree:
        if not isinstance(tree, Mapping):
            return tree
        new = {name: visit(value, f"{path}/{name}" if path else str(name)) for name, value in tree.items()}
        if not {"scale", "bias"} & new.keys():
            return new
        found[path] = path
        hits = {pattern for pattern in patterns if matches(pattern, path)}
        unmatched.difference_update(hits)
        if hits and "bias" not in new:
            new["bias"] = jnp.zeros_like(new["scale"])
        if hits and not {"scale", "kernel", "embedding"} & new.keys():
            new["scale"] = jnp.ones_like(new["bias"])
        return new

    completed = visit(params, "")
    if unmatched:
        wrong = sorted(unmatched)[0]
        raise PatternError(
            f"complete_norms: {wrong!r} matches no dict with a scale or a bias; nearest are {nearest(wrong, found)}."
        )
    return completed
