"""Where the tensors of a GGUF file of a decoder go, and what can stay in its blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from subspace_jax.core import Role, WeightFileError
from subspace_jax.weights import BLOCK_KINDS, Packed, pack_blocks

from ._gguf_tensor import GgufTensor
from ._llama_config import LlamaConfig
from ._pretrained import TensorRule


def unpermute_rotary(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undoes GGUF's reordering of query and key rows.

    The file stores element `i` of the first half of a head beside element `i` of the second half, for models
    that rotate neighbors; `apply_rotary` rotates halves. A wrong order is silent: the model only gets worse.

    Args:
        rows: `[heads * head_dim, width]` as stored.
        heads: number of heads.

    Returns:
        `[heads * head_dim, width]`, each head's first half before its second half.

    Example:
        >>> import numpy as np
        >>> unpermute_rotary(np.array([[0], [2], [1], [3]]), heads=1).ravel().tolist()
        [0, 1, 2, 3]
    """
    pairs = rows.reshape(heads, -1, 2, rows.shape[-1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def permute_rotary(rows: np.ndarray, heads: int) -> np.ndarray:
    """Puts query and key rows into the order of such a file; undoes `unpermute_rotary`."""
    halves = rows.reshape(heads, 2, -1, rows.shape[-1])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def gguf_rules(config: LlamaConfig, keep: int, *, permuted: bool) -> dict[str, TensorRule]:
    """Returns rules for a GGUF file of a decoder.

    Args:
        config: what the file holds; norms that multiply by `1 + scale` are stored with the one added.
        keep: number of layers to load; the others are checked and dropped.
        permuted: whether rows of queries and keys are stored in the order of `unpermute_rotary`.

    Returns:
        Rule by tensor name; matrices are `(out, in)` in the file.
    """

    offset = 1.0 if config.unit_offset else 0.0
    width = config.width
    table = Role("embedding", (), (0,), (1,), uses=2 if config.tie_embeddings else 1)
    shape = (config.vocab_size, width)
    rules = {
        "token_embd.weight": TensorRule(shape, "embedding/embedding", role=table, leaf_shape=shape),
        "output_norm.weight": dataclasses.replace(_norm(width, offset), path="norm/scale"),
    }
    if not config.tie_embeddings:
        turned = (width, config.vocab_size)
        rules["output.weight"] = TensorRule(
            shape, "head/kernel", np.transpose, Role.dense(), turned, restore=np.transpose
        )
    for layer in range(config.num_layers):
        ours = f"decoder/layer_{layer}" if layer < keep else None
        for name, (path, rule) in _layer_rules(config, offset, permuted).items():
            rules[f"blk.{layer}.{name}"] = dataclasses.replace(rule, path=ours and f"{ours}/{path}")
    return rules


def _norm(features: int, offset: float) -> TensorRule:
    return TensorRule((features,), None, lambda a: a - offset, restore=lambda a: a + np.float32(offset))


def _layer_rules(config: LlamaConfig, offset: float, permuted: bool) -> dict[str, tuple[str, TensorRule]]:
    """Path within a layer and rule by the name within it."""
    width, hidden, size = config.width, config.mlp_width, config.head_dim
    query, key_value = config.num_heads, config.num_kv_heads

    def dense(inputs: int, outputs: int) -> TensorRule:
        return TensorRule((outputs, inputs), None, np.transpose, Role.dense(), (inputs, outputs), restore=np.transpose)

    def heads(count: int, turned: bool) -> tuple[TensorRule, TensorRule]:
        """Rules of the kernel and of the bias of a projection to heads."""
        shape = (width, count, size)

        def rows(found: np.ndarray) -> np.ndarray:
            return unpermute_rotary(found, count) if turned and permuted else found

        def stored(found: np.ndarray) -> np.ndarray:
            return permute_rotary(found, count) if turned and permuted else found

        kernel = TensorRule(
            (count * size, width),
            None,
            lambda a: rows(a).T.reshape(shape),
            Role.dense((0,), (1, 2)),
            shape,
            rows,
            lambda a: stored(a.reshape(width, -1).T),
        )
        bias = TensorRule(
            (count * size,),
            None,
            lambda a: rows(a[:, None]).reshape(count, size),
            restore=lambda a: stored(a.reshape(-1, 1)).reshape(-1),
        )
        return kernel, bias

    shape = (query, size, width)
    output = TensorRule(
        (width, query * size),
        None,
        lambda a: a.T.reshape(shape),
        Role.dense((0, 1), (2,)),
        shape,
        restore=lambda a: a.reshape(-1, width).T,
    )
    found: dict[str, tuple[str, TensorRule]] = {
        "attn_output.weight": ("attention/output/kernel", output),
        "ffn_gate.weight": ("mlp/gate/kernel", dense(width, hidden)),
        "ffn_up.weight": ("mlp/up/kernel", dense(width, hidden)),
        "ffn_down.weight": ("mlp/down/kernel", dense(hidden, width)),
        "attn_norm.weight": ("attention_norm/scale", _norm(width, offset)),
        "ffn_norm.weight": ("mlp_norm/scale", _norm(width, offset)),
    }
    for name, count in (("query", query), ("key", key_value), ("value", key_value)):
        kernel, bias = heads(count, turned=name != "value")
        found[f"attn_{name[0]}.weight"] = (f"attention/{name}/kernel", kernel)
        if config.qkv_bias:
            found[f"attn_{name[0]}.bias"] = (f"attention/{name}/bias", bias)
        if config.qk_norm and name != "value":
            found[f"attn_{name[0]}_norm.weight"] = (f"attention/{name}_norm/scale", _norm(size, offset))
    if config.output_bias:
        found["attn_output.bias"] = ("attention/output/bias", TensorRule((width,), None))
    if config.post_norms:
        found["post_attention_norm.weight"] = ("attention_post_norm/scale", _norm(width, offset))
        found["post_ffw_norm.weight"] = ("mlp_post_norm/scale", _norm(width, offset))
    return found


def pack_tensor(dtype: Any, source: str) -> Callable[[GgufTensor, TensorRule], Packed | None]:
    """Returns a function of tensor and rule that keeps a tensor in its blocks, or gives None where it has none.

    Args:
        dtype: that the weights stand for.
        source: what error messages call the file.
    """

    def store(tensor: GgufTensor, rule: TensorRule) -> Packed | None:
        if rule.role is None or tensor.kind not in BLOCK_KINDS:
            return None
        kind = BLOCK_KINDS[tensor.kind]
        blocks = tensor.raw.reshape(-1, kind.size)
        for place in kind.scales:
            if not np.isfinite(np.ascontiguousarray(blocks[:, place : place + 2]).view("<f2")).all():
                raise WeightFileError(f"{source}: tensor {tensor.name!r} holds NaN or infinity; the file is damaged")
        rows = rule.rows(tensor.rows())
        return pack_blocks(rows, tensor.kind, rule.role, rule.leaf_shape, dtype)

    return store
