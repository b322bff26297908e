"""Weights that Hugging Face's folders hold in float8, with scales beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from subspace_jax.core import WeightFileError

from ._hf_facts import Facts

SCALES = (".weight_scale_inv", ".weight_scale")
# Scales of activations, which a model that computes in higher precision has no use for.
UNUSED = (".input_scale", ".activation_scale")
_BLOCK = (128, 128)
_FORMATS = ("float-quantized", "naive-quantized")


def float8_block(facts: Facts) -> tuple[int, int]:
    """Returns the rows and columns of a block of weights that share a scale, where scales are of blocks.

    Args:
        facts: of `config.json`.

    Raises:
        WeightFileError: the entry `quantization_config` tells of another form than float8 with scales of tensors,
            channels or blocks.
    """
    found = facts.get("quantization_config")
    if found is None:
        return _BLOCK
    told = Facts(found if isinstance(found, Mapping) else {"quant_method": found}, f"{facts.source}: quantization")
    method = told.get("quant_method", "?")
    if method == "fp8":
        told.expect("fmt", "e4m3", "float8_e4m3fn")
        size = told.get("weight_block_size", _BLOCK)
    elif method == "compressed-tensors":
        told.expect("format", *_FORMATS)
        size = _compressed_block(told)
    else:
        facts.refuse("quantization_config", method, "is not read; give the model's plain weights, or float8 ones")
    if not isinstance(size, list | tuple) or len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size):
        told.refuse("weight_block_size", size, "is no number of rows and of columns")
    return int(size[0]), int(size[1])


def _compressed_block(told: Facts) -> Any:
    """The block of the groups of modules, all of which must be float8 without offsets."""
    size: Any = _BLOCK
    for name, group in (told.get("config_groups") or {}).items():
        weights = Facts(group.get("weights") or {}, f"{told.source}: {name}")
        weights.expect("num_bits", 8)
        weights.expect("type", "float")
        weights.expect("strategy", "tensor", "channel", "block")
        weights.expect("symmetric", True)
        size = weights.get("block_structure", size)
    return size


def split_scales(names: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Returns the names without those of scales, and the files' names of scales by the name of their weight."""
    scales: dict[str, str] = {}
    for name, theirs in names.items():
        ending = next((ending for ending in SCALES if name.endswith(ending)), None)
        if ending is not None:
            scales[f"{name.removesuffix(ending)}.weight"] = theirs
    rest = {name: theirs for name, theirs in names.items() if not name.endswith((*SCALES, *UNUSED))}
    return rest, scales


def dequantize_float8(weight: np.ndarray, scale: np.ndarray, block: tuple[int, int], name: str) -> np.ndarray:
    r"""Returns the float32 weights \(w_{ij}\,s\), with \(s\) that of the tensor, of row \(i\), or of the block.

    Args:
        weight: `[out, in]` in float8 with four bits of exponent.
        scale: of one value; `[out]` or `[out, 1]`; or `[blocks of rows, blocks of columns]`.
        block: rows and columns of a block; the last ones may be cut.
        name: what error messages call it.

    Raises:
        WeightFileError: another dtype, scales that are no finite numbers, or as many as no form has.

    Example:
        >>> import jax.numpy as jnp, numpy as np
        >>> w = np.ones((2, 3), jnp.float8_e4m3fn)
        >>> dequantize_float8(w, np.array([2.0, 4.0], np.float32), (128, 128), "w").tolist()
        [[2.0, 2.0, 2.0], [4.0, 4.0, 4.0]]
    """
    if weight.dtype != jnp.float8_e4m3fn:
        raise WeightFileError(f"{name} is {weight.dtype} and has a scale; only float8_e4m3fn is read with one.")
    if not jnp.issubdtype(scale.dtype, jnp.floating) or scale.dtype.itemsize < 2:
        raise WeightFileError(f"the scale of {name} is {scale.dtype}; expected float32, float16 or bfloat16.")
    factors, wide = scale.astype(np.float32), weight.astype(np.float32)
    if not np.isfinite(factors).all():
        raise WeightFileError(f"the scale of {name} holds NaN or infinity; the file is damaged.")
    if factors.size == 1:
        return wide * factors.reshape(())
    if wide.ndim == 2 and factors.shape in ((len(wide),), (len(wide), 1)):
        return wide * factors.reshape(-1, 1)
    if wide.ndim == 2 and factors.shape == tuple(-(-n // size) for n, size in zip(wide.shape, block, strict=True)):
        whole = np.repeat(np.repeat(factors, block[0], axis=0), block[1], axis=1)
        return wide * whole[: wide.shape[0], : wide.shape[1]]
    raise WeightFileError(
        f"{name} of shape {weight.shape} has scales of shape {scale.shape}; expected one, one for each row, or one for "
        f"each block of {block[0]} x {block[1]}."
    )
