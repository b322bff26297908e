"""What a `config.json` of CLIP says, as a configuration of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ._clip_config import CLIP_ACTIVATIONS, ClipConfig, ClipTower
from ._hf_facts import Facts

# What these are where a file leaves them out.
_TEXT = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8}
_IMAGE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_LEGACY_END = 2  # files of before a certain version have this, and mean the highest id of a text


def clip_config(facts: Facts) -> ClipConfig:
    """Returns the configuration that the file states; older files have `text_config_dict` in place of `text_config`.

    Args:
        facts: of the file.

    Raises:
        WeightFileError: an entry that our module cannot serve.
    """
    text, image = (_part(facts, name) for name in ("text", "vision"))
    image.expect("num_channels", 3)
    patch, side = int(image.get("patch_size", 32)), int(image.get("image_size", 224))
    if side % patch:
        image.refuse("image_size", side, f"is no multiple of patch_size={patch}")
    end = int(text.get("eos_token_id", 49407))
    return ClipConfig(
        text=_tower(text, _TEXT),
        image=_tower(image, _IMAGE),
        vocab_size=int(text.get("vocab_size", 49408)),
        max_positions=int(text.get("max_position_embeddings", 77)),
        end_token=None if end == _LEGACY_END else end,
        patch_size=patch,
        position_grid=side // patch,
        projection=int(facts.get("projection_dim", 512)),
    )


def _part(facts: Facts, name: str) -> Facts:
    """The entries of one tower; those of the older spelling count where both are there, as in their own library."""
    found = {**(facts.get(f"{name}_config") or {}), **(facts.get(f"{name}_config_dict") or {})}
    return Facts(found, f"{facts.source}: {name}_config")


def _tower(facts: Facts, usual: Mapping[str, Any]) -> ClipTower:
    activation = facts.get("hidden_act", "quick_gelu")
    facts.expect("hidden_act", *CLIP_ACTIVATIONS)
    width, hidden, layers, heads = (int(facts.get(name, default)) for name, default in usual.items())
    return ClipTower(width, layers, heads, hidden, activation, float(facts.get("layer_norm_eps", 1e-5)))
