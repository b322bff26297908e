"""What is checked of an adapter file: its bytes, its tree, and the base that it was made for."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from subspace_jax.core import Full, StructureError, is_weight, resolve_links
from subspace_jax.io._base import BaseArrays
from subspace_jax.io._errors import ManifestError, listing
from subspace_jax.io._rebuild import array_nodes


def checksum(text: str, tensors: Mapping[str, np.ndarray]) -> str:
    """Returns the SHA-256 of a manifest and of the bytes of all tensors."""
    total = hashlib.sha256(text.encode("utf-8", "surrogatepass"))
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"\n{name} {tensor.dtype} {tensor.shape}\n".encode("utf-8", "surrogatepass"))
        total.update(np.asarray(tensor, order="C").reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def base_hashes(leaves: Mapping[str, Any], nodes: Mapping[str, Any], base: BaseArrays) -> dict[str, str]:
    """Returns the hash of every adapted array of the base that the nodes do not refer to anyway.

    An array that learns as a whole does not depend on what was there before, as a head that is drawn anew.
    """
    referred = {there for path, node in nodes.items() for _, (there, _) in array_nodes(node, path)[1].values()}
    adapted = (path for path, leaf in leaves.items() if is_weight(leaf) and not isinstance(leaf, Full))
    return {path: base.digest(path) for path in adapted if path not in referred}


def check_links(adapted: Any) -> None:
    """Raises ManifestError for weights that read what a weight outside of the tree stores."""
    try:
        resolve_links(adapted)
    except StructureError as error:
        raise ManifestError(
            f"{error} To save a part of it alone, take that part of sj.core.resolve_links(adapted), in which every "
            "weight holds its own."
        ) from error


def check_paths(ours: Mapping[str, Any], theirs: Mapping[str, Any], our_name: str, their_name: str) -> None:
    """Raises ManifestError unless two trees have the same paths."""
    lines = [f"{path!r} is in {our_name}, not in {their_name}" for path in ours if path not in theirs]
    lines += [f"{path!r} is in {their_name}, not in {our_name}" for path in theirs if path not in ours]
    if lines:
        raise ManifestError(
            f"{our_name} and {their_name} are not of one tree:{listing(lines)}\nPass the parameters exactly as adapt() "
            "got them."
        )


def check_stand_ins(leaves: Mapping[str, Any], base: BaseArrays) -> None:
    """Raises ManifestError unless every weight stands for an array like that of the base."""
    wrong = []
    for path, leaf in leaves.items():
        if is_weight(leaf):
            have, want = base.leaves[path], shape_of(leaf, path)
            if (tuple(have.shape), np.dtype(have.dtype)) != (tuple(want), np.dtype(leaf.dtype)):
                wrong.append(
                    f"{path!r} is {have.dtype}{list(have.shape)} in the parameters, and the {type(leaf).__name__} "
                    f"stands for {leaf.dtype}{list(want)}"
                )
    if wrong:
        raise ManifestError(f"the adapters do not fit the parameters:{listing(wrong)}")


def shape_of(weight: Any, path: str) -> tuple[int, ...]:
    """Returns the shape that a weight stands for; raises ManifestError if its parts are missing."""
    try:
        return weight.shape
    except (AttributeError, TypeError, IndexError) as error:
        raise ManifestError(
            f"{path}: parts of the {type(weight).__name__} are missing. combine() the two trees of partition() first."
        ) from error


def refuse_base(wrong: list[str]) -> None:
    """Raises ManifestError if there is a line of what differs in the base."""
    if wrong:
        raise ManifestError(
            f"the parameters are not those that were adapted:{listing(wrong)}\nLoad the same pretrained checkpoint, "
            "in the same dtype; verify=False puts the adapters on other numbers of the same shapes."
        )
