"""What a `config.json` says of rotary frequencies and of windows of attention."""

from __future__ import annotations

from collections.abc import Mapping

from ._hf_facts import Facts
from ._rotary import RopeScaling


def rope_of(facts: Facts, layer_type: str | None = None) -> tuple[float | None, RopeScaling | None]:
    """Returns base and scaling, of the older `rope_theta` and `rope_scaling` or the newer `rope_parameters`."""
    found = facts.get("rope_parameters")
    if found is None:
        found = {"rope_theta": facts.get("rope_theta"), **(facts.get("rope_scaling") or {})}
    elif "rope_type" not in found and any(isinstance(value, Mapping) for value in found.values()):
        found = found.get(layer_type) or {}
    kind = found.get("rope_type", found.get("type", "default"))
    partial = found.get("partial_rotary_factor", facts.get("partial_rotary_factor", 1.0))
    if partial not in (None, 1, 1.0):
        facts.refuse("partial_rotary_factor", partial, "is not served; every dimension is turned")
    if kind in ("default", None):
        scaling = None
    elif kind == "linear":
        scaling = RopeScaling("linear", float(found["factor"]))
    elif kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        lacking = [name for name in names if name not in found]
        if lacking:
            facts.refuse("rope_scaling", found, f"lacks {', '.join(lacking)}")
        factor, low, high, original = (float(found[name]) for name in names)
        scaling = RopeScaling("llama3", factor, low, high, int(original))
    else:
        facts.refuse("rope_type", kind, "is not served; expected default, linear or llama3")
    base = found.get("rope_theta", facts.get("rope_theta"))
    return None if base is None else float(base), scaling


def windows_of(facts: Facts, layers: int) -> tuple[int | None, tuple[bool, ...] | None]:
    """Returns the window, and in which layers it holds."""
    window, types = facts.get("sliding_window"), facts.get("layer_types")
    if types is not None:
        strange = sorted(set(types) - {"full_attention", "sliding_attention"})
        if strange or len(types) != layers:
            facts.refuse("layer_types", types, f"is not served; expected {layers} of full or sliding attention")
        slides = tuple(one == "sliding_attention" for one in types)
    elif (pattern := facts.get("sliding_window_pattern", facts.get("_sliding_window_pattern"))) is not None:
        slides = tuple(bool((layer + 1) % pattern) for layer in range(layers))
    elif facts.get("model_type") in ("qwen2", "qwen3"):
        used = bool(facts.get("use_sliding_window", False))
        slides = tuple(used and layer >= facts.get("max_window_layers", layers) for layer in range(layers))
    else:
        slides = (window is not None,) * layers
    if window is None or not any(slides):
        return None, None
    return int(window), slides
