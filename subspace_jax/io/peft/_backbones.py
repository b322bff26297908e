"""Ready name maps for the backbones of this library, as Hugging Face's modules are called."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Literal

from subspace_jax.io.peft._names import NameMap, NameRule

_PATCHES = (
    NameRule("embeddings/patch", "embeddings.patch_embeddings.projection", "conv"),
    NameRule("embeddings", "embeddings", "array", leaves=(("cls", "cls_token"), ("position", "position_embeddings"))),
)


def bert_names() -> NameMap:
    """Returns the names of `Bert` (and MiniLM) as `BertModel` has them.

    Example:
      >>> from subspace_jax.io import NameMap, NameRule
      >>> head = NameMap((NameRule("classifier", "classifier"),))
      >>> names = bert_names().inside("backbone", "bert") + head  # BertClassifier
      >>> names.rules[0].path, names.rules[0].module
      ('backbone/embeddings/word', 'bert.embeddings.word_embeddings')
    """
    tables = {name: f"{name}_embeddings" for name in ("word", "position", "token_type")}
    layer = {f"attention/{name}": f"attention.self.{name}" for name in ("query", "key", "value")}
    layer |= {"attention/output": "attention.output.dense", "mlp/fc1": "intermediate.dense", "mlp/fc2": "output.dense"}
    norms = {"attention_norm": "attention.output.LayerNorm", "mlp_norm": "output.LayerNorm"}
    return NameMap(
        (
            *(NameRule(f"embeddings/{ours}", f"embeddings.{theirs}", "embedding") for ours, theirs in tables.items()),
            NameRule("embeddings/norm", "embeddings.LayerNorm", "vector"),
            *_layers("encoder", "encoder.layer", [*_dense(layer), *_vectors(norms)]),
        )
    )


def dinov2_names(transformers: Literal[4, 5] = 5) -> NameMap:
    """Returns the names of `Vit` as `Dinov2Model` has them.

    Args:
      transformers: major version of Hugging Face's library; its fifth renamed the attention projections.

    Raises:
      ValueError: another version.

    Example:
      >>> {rule.path: rule.module for rule in dinov2_names().rules}["encoder/layers/attention/query"]
      'encoder.layer.{layer}.attention.q_proj'
    """
    if transformers not in (4, 5):
        raise ValueError(f"dinov2_names: transformers={transformers!r}; the names of versions 4 and 5 are known.")
    parts = ("query", "key", "value")
    if transformers == 5:
        attention = {f"attention/{part}": f"attention.{part[0]}_proj" for part in parts}
        output = "attention.o_proj"
    else:
        attention = {f"attention/{part}": f"attention.attention.{part}" for part in parts}
        output = "attention.output.dense"
    dense = attention | {"mlp/fc1": "mlp.fc1", "mlp/fc2": "mlp.fc2"}
    scales = [
        NameRule(name, name, "vector", leaves=(("scale", "lambda1"),)) for name in ("layer_scale1", "layer_scale2")
    ]
    heads = NameRule("attention/output", output, inputs=2)
    rules = [*_dense(dense), heads, *_vectors({"norm1": "norm1", "norm2": "norm2"}), *scales]
    return NameMap(
        (
            *_PATCHES,
            *_layers("encoder", "encoder.layer", rules),
            NameRule("norm", "layernorm", "vector"),
        )
    )


def vit_names(transformers: Literal[4, 5] = 5) -> NameMap:
    """Returns the names of `Vit` without layer scales as `ViTModel` has them.

    Args:
      transformers: major version of Hugging Face's library; its fifth renamed what the layers hold, and writes files
        with the names of the fourth.

    Raises:
      ValueError: another version.

    Example:
      >>> {rule.path: rule.module for rule in vit_names().rules}["encoder/layers/norm2"]
      'layers.{layer}.layernorm_after'
    """
    if transformers not in (4, 5):
        raise ValueError(f"vit_names: transformers={transformers!r}; the names of versions 4 and 5 are known.")
    parts = ("query", "key", "value")
    if transformers == 5:
        layer, output = "layers", "attention.o_proj"
        dense = {f"attention/{part}": f"attention.{part[0]}_proj" for part in parts}
        dense |= {"mlp/fc1": "mlp.fc1", "mlp/fc2": "mlp.fc2"}
    else:
        layer, output = "encoder.layer", "attention.output.dense"
        dense = {f"attention/{part}": f"attention.attention.{part}" for part in parts}
        dense |= {"mlp/fc1": "intermediate.dense", "mlp/fc2": "output.dense"}
    heads = NameRule("attention/output", output, inputs=2)
    norms = _vectors({"norm1": "layernorm_before", "norm2": "layernorm_after"})
    rules = [*_dense(dense), heads, *norms]
    return NameMap((*_PATCHES, *_layers("encoder", layer, rules), NameRule("norm", "layernorm", "vector")))


def llama_names(*, tie_embeddings: bool = True, post_norms: bool = False) -> NameMap:
    """Returns the names of `Llama` (and SmolLM2) as `LlamaForCausalLM` has them; Mistral's, Qwen's and Gemma's too.

    Args:
      tie_embeddings: whether the model has the embedding's table as its head too.
      post_norms: whether it normalizes what its layers add, as Gemma does, where the norms are called otherwise.

    Example:
      >>> {rule.path: rule.module for rule in llama_names().rules}["decoder/layer_{layer}/mlp/gate"]
      'model.layers.{layer}.mlp.gate_proj'
    """
    dense = {f"attention/{part}": f"self_attn.{part[0]}_proj" for part in ("query", "key", "value")}
    dense |= {f"mlp/{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")}
    norms = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if post_norms:
        norms |= {"attention_post_norm": "post_attention_layernorm", "mlp_norm": "pre_feedforward_layernorm"}
        norms |= {"mlp_post_norm": "post_feedforward_layernorm"}
    norms |= {f"attention/{part}_norm": f"self_attn.{part[0]}_norm" for part in ("query", "key")}
    heads = NameRule("attention/output", "self_attn.o_proj", inputs=2)
    return NameMap(
        (
            NameRule("embedding", "model.embed_tokens", "embedding", shared=tie_embeddings),
            *_layers("decoder", "model.layers", [*_dense(dense), heads, *_vectors(norms)]),
            NameRule("norm", "model.norm", "vector"),
            NameRule("head", "lm_head"),
        )
    )


def clip_names() -> NameMap:
    """Returns the names of `Clip` as `CLIPModel` has them.

    Example:
      >>> {rule.path: rule.module for rule in clip_names().rules}["image/encoder/layers/attention/output"]
      'vision_model.encoder.layers.{layer}.self_attn.out_proj'
    """
    dense = {f"attention/{part}": f"self_attn.{part[0]}_proj" for part in ("query", "key", "value")}
    dense |= {"mlp/fc1": "mlp.fc1", "mlp/fc2": "mlp.fc2"}
    heads = NameRule("attention/output", "self_attn.out_proj", inputs=2)
    layer = [*_dense(dense), heads, *_vectors({"norm1": "layer_norm1", "norm2": "layer_norm2"})]
    image = "vision_model.embeddings"
    return NameMap(
        (
            *(
                NameRule(f"text/embeddings/{part}", f"text_model.embeddings.{part}_embedding", "embedding")
                for part in ("token", "position")
            ),
            NameRule("image/embeddings/patch", f"{image}.patch_embedding", "conv"),
            NameRule("image/embeddings", image, "array", leaves=(("cls", "class_embedding"),)),
            NameRule("image/embeddings/position", f"{image}.position_embedding", "embedding"),
            *_layers("text/encoder", "text_model.encoder.layers", layer),
            *_layers("image/encoder", "vision_model.encoder.layers", layer),
            *_vectors({"text/norm": "text_model.final_layer_norm", "image/norm": "vision_model.post_layernorm"}),
            *_vectors({"image/norm_before": "vision_model.pre_layrnorm"}),
            *_dense({"text_projection": "text_projection", "image_projection": "visual_projection"}),
            NameRule("", "logit_scale", "array", leaves=(("logit_scale", ""),)),
        )
    )


def _dense(names: Mapping[str, str]) -> list[NameRule]:
    return [NameRule(ours, theirs) for ours, theirs in names.items()]


def _vectors(names: Mapping[str, str]) -> list[NameRule]:
    return [NameRule(ours, theirs, "vector") for ours, theirs in names.items()]


def _layers(path: str, module: str, rules: Iterable[NameRule]) -> list[NameRule]:
    """The rules of one layer for all layers, unrolled as `layer_0`, `layer_1`, ... and stacked as `layers`."""
    return [
        dataclasses.replace(rule, path=f"{path}/{name}/{rule.path}", module=f"{module}.{{layer}}.{rule.module}")
        for name in ("layer_{layer}", "layers")
        for rule in rules
    ]
