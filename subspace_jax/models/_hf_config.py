"""What a `config.json` of Hugging Face says, as configurations of our modules; what they cannot do is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from subspace_jax.core import WeightFileError
from subspace_jax.io import NameMap, bert_names, clip_names, dinov2_names, llama_names, vit_names

from ._bert import Bert, BertConfig
from ._clip import Clip
from ._hf_clip import clip_config
from ._hf_facts import Facts
from ._hf_float8 import float8_block
from ._hf_rope import rope_of, windows_of
from ._llama import Llama
from ._llama_config import LlamaConfig
from ._vit import Vit, VitConfig


@dataclasses.dataclass(frozen=True)
class Described:
    """A model as its `config.json` describes it.

    Attributes:
        module: class of the module.
        config: its configuration.
        file_names: what the module's parts are called in the model's files.
        names: what they are called in PyTorch's modules, where that differs.
        prefix: that names in files may have in front, where the file is of a model with a head.
        dropped: ends of the names of tensors that are of no use here: buffers, and heads of pretraining.
        float8_block: rows and columns that share a scale, of weights in float8 whose scales are of blocks.
    """

    module: type
    config: Any
    file_names: NameMap
    names: NameMap
    prefix: str = ""
    dropped: tuple[str, ...] = ()
    float8_block: tuple[int, int] = (128, 128)


def describe_model(entries: Mapping[str, Any], source: str) -> Described:
    """Returns the module and configuration that a `config.json` asks for.

    Args:
        entries: of the file.
        source: what messages call it.

    Raises:
        WeightFileError: a kind of model, or an entry, that our modules cannot serve; the message names it.
    """
    facts = Facts(entries, source)
    kind = facts["model_type"]
    if kind not in KINDS:
        facts.refuse("model_type", kind, f"is not served; expected one of {', '.join(KINDS)}")
    block = float8_block(facts)
    try:
        return dataclasses.replace(KINDS[kind](facts), float8_block=block)
    except WeightFileError:
        raise
    except (ValueError, TypeError) as error:
        raise WeightFileError(f"{source}: impossible entries: {error}") from error


def _decoder(facts: Facts, **options: Any) -> Described:
    layers, heads = int(facts["num_hidden_layers"]), int(facts["num_attention_heads"])
    base, scaling = rope_of(facts, "full_attention")
    window, slides = windows_of(facts, layers)
    facts.expect("attn_logit_softcapping")
    facts.expect("final_logit_softcapping")
    facts.expect("use_bidirectional_attention", False)
    options = {
        "vocab_size": int(facts["vocab_size"]),
        "width": int(facts["hidden_size"]),
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": int(facts.get("num_key_value_heads", heads)),
        "head_size": facts.get("head_dim"),
        "mlp_width": int(facts["intermediate_size"]),
        "max_positions": int(facts.get("max_position_embeddings", 2048)),
        "epsilon": float(facts.get("rms_norm_eps", 1e-6)),
        "rope_base": 10000.0 if base is None else base,
        "rope_scaling": scaling,
        "window": window,
        "window_layers": slides,
        "tie_embeddings": bool(facts.get("tie_word_embeddings", False)),
        **options,
    }
    config = LlamaConfig(**options)
    names = llama_names(tie_embeddings=config.tie_embeddings, post_norms=config.post_norms)
    return Described(Llama, config, names, names, dropped=(".rotary_emb.inv_freq", ".masked_bias"))


def _llama(facts: Facts) -> Described:
    facts.expect("hidden_act", "silu")
    biased = bool(facts.get("attention_bias", False))
    return _decoder(facts, qkv_bias=biased, output_bias=biased, mlp_bias=bool(facts.get("mlp_bias", False)))


def _mistral(facts: Facts) -> Described:
    facts.expect("hidden_act", "silu")
    return _decoder(facts)


def _qwen2(facts: Facts) -> Described:
    facts.expect("hidden_act", "silu")
    return _decoder(facts, qkv_bias=True)


def _qwen3(facts: Facts) -> Described:
    facts.expect("hidden_act", "silu")
    biased = bool(facts.get("attention_bias", False))
    return _decoder(facts, qkv_bias=biased, output_bias=biased, qk_norm=True)


def _gemma3(facts: Facts) -> Described:
    facts.expect("hidden_activation", "gelu_pytorch_tanh")
    facts.expect("attention_bias", False)
    local, local_scaling = rope_of(facts, "sliding_attention")
    if facts.get("rope_parameters") is None:
        local, local_scaling = float(facts.get("rope_local_base_freq", 10000.0)), None
    if local_scaling is not None:
        facts.refuse("rope_parameters", "sliding_attention", "with a scaling is not served")
    base, _ = rope_of(facts, "full_attention")
    return _decoder(
        facts,
        rope_base=1e6 if base is None else base,
        window_rope_base=10000.0 if local is None else local,
        attention_scale=float(facts.get("query_pre_attn_scalar", 256)) ** -0.5,
        head_size=facts.get("head_dim", 256),
        tie_embeddings=bool(facts.get("tie_word_embeddings", True)),
        qk_norm=True,
        post_norms=True,
        unit_offset=True,
        scale_embeddings=True,
        activation="gelu_tanh",
    )


def _encoder_options(facts: Facts) -> dict[str, Any]:
    facts.expect("hidden_act", "gelu")
    return {
        "width": int(facts["hidden_size"]),
        "num_layers": int(facts["num_hidden_layers"]),
        "num_heads": int(facts["num_attention_heads"]),
    }


def _bert(facts: Facts, prefix: str = "bert.", **options: Any) -> Described:
    facts.expect("position_embedding_type", "absolute")
    facts.expect("is_decoder", False)
    config = BertConfig(
        vocab_size=int(facts["vocab_size"]),
        mlp_width=int(facts["intermediate_size"]),
        max_positions=int(facts["max_position_embeddings"]),
        num_token_types=int(facts["type_vocab_size"]),
        epsilon=float(facts.get("layer_norm_eps", 1e-12)),
        **_encoder_options(facts),
        **options,
    )
    dropped = ("embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias", "embeddings.token_type_ids")
    return Described(Bert, config, bert_names(), bert_names(), prefix, dropped)


def _roberta(facts: Facts) -> Described:
    return _bert(facts, "roberta.", padding_position=int(facts.get("pad_token_id", 1)))


def _vit(facts: Facts, **options: Any) -> Described:
    facts.expect("qkv_bias", True)
    facts.expect("num_channels", 3)
    patch = int(facts["patch_size"])
    config = VitConfig(
        patch_size=patch,
        position_grid=int(facts["image_size"]) // patch,
        mlp_width=int(facts.get("intermediate_size", 0)) or int(facts["hidden_size"] * facts["mlp_ratio"]),
        epsilon=float(facts.get("layer_norm_eps", 1e-12)),
        **_encoder_options(facts),
        **options,
    )
    if not config.layer_scale:
        dropped = ("pooler.dense.weight", "pooler.dense.bias", "embeddings.mask_token")
        return Described(Vit, config, vit_names(4), vit_names(), "vit.", dropped)
    return Described(Vit, config, dinov2_names(4), dinov2_names(), "dinov2.", ("embeddings.mask_token",))


def _dinov2(facts: Facts) -> Described:
    facts.expect("use_swiglu_ffn", False)
    return _vit(facts)


def _clip(facts: Facts) -> Described:
    dropped = ("embeddings.position_ids",)
    return Described(Clip, clip_config(facts), clip_names(), clip_names(), dropped=dropped)


KINDS: Mapping[str, Callable[[Facts], Described]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma3_text": _gemma3,
    "bert": _bert,
    "roberta": _roberta,
    "vit": lambda facts: _vit(facts, layer_scale=False),
    "dinov2": _dinov2,
    "clip": _clip,
}
