"""Writes a run's weights for other programs, reads them back, and refuses what does not agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

import subspace_jax as sj
from subspace_jax.io import export_tensors, import_tensors, read_safetensors, replacing, write_safetensors

from ._backbone import Backbone
from ._errors import UserError
from ._peft import peft_names
from ._problem import Problem

TENSORS, CONFIG = "model.safetensors", "config.json"


def write_merged(folder: Path, merged: Any, backbone: Backbone, problem: Problem) -> Path:
    """Writes plain weights by PyTorch's names with a `config.json`.

    Args:
      folder: where; made if missing.
      merged: parameters without stand-ins.
      backbone: the model.
      problem: model and head.

    Raises:
      UserError: the names of the model in PyTorch are not known.
    """
    names = peft_names(backbone, classifies=problem.classifies)
    if names is None:
        raise UserError(f"the names of --model {backbone.name} in PyTorch are not known, so it cannot be written.")
    tensors = export_tensors(merged, names)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / TENSORS, tensors, {"format": "pt"})
    with replacing(folder / CONFIG) as file:
        file.write_text(json.dumps(_config(backbone, problem), indent=2) + "\n", encoding="utf-8")
    return folder


def _config(backbone: Backbone, problem: Problem) -> dict[str, Any]:
    """What Hugging Face's library needs to build the module, where the model did not come from it."""
    config = backbone.model.config
    shared = {"num_hidden_layers": config.num_layers, "num_attention_heads": config.num_heads}
    shared |= {"hidden_size": config.width, "intermediate_size": config.mlp_width}
    if problem.classifies:
        shared["id2label"] = {str(i): str(name) for i, name in enumerate(problem.classes)}
    if backbone.kind == "language model":
        return shared | {
            "architectures": ["LlamaForSequenceClassification" if problem.classifies else "LlamaForCausalLM"],
            "model_type": "llama",
            "num_key_value_heads": config.num_kv_heads,
            "vocab_size": config.vocab_size,
            "max_position_embeddings": config.max_positions,
            "rms_norm_eps": config.epsilon,
            "rope_theta": config.rope_base,
            "tie_word_embeddings": config.tie_embeddings,
            "eos_token_id": list(backbone.text_format.end_tokens),
            "bos_token_id": backbone.text_format.bos_token,
        }
    if backbone.kind == "text encoder":
        return shared | {
            "architectures": ["BertForSequenceClassification"],
            "model_type": "bert",
            "vocab_size": config.vocab_size,
            "max_position_embeddings": config.max_positions,
            "type_vocab_size": config.num_token_types,
            "layer_norm_eps": config.epsilon,
        }
    return shared | {
        "architectures": ["Dinov2ForImageClassification"],
        "model_type": "dinov2",
        "patch_size": config.patch_size,
        "image_size": config.patch_size * config.position_grid,
        "mlp_ratio": config.mlp_width // config.width,
        "layer_norm_eps": config.epsilon,
    }


def check_export(found: Any, adapted: Any, base: Any, apply: Any, batch: Any, what: str) -> float:
    """Demands that reloaded parameters do what the adapted ones do.

    Args:
      found: parameters read back.
      adapted: those of the run.
      base: those before the run.
      apply: logits of parameters and batch.
      batch: to compare on.
      what: how messages call the export.

    Returns:
      `max|exported - adapted| / max|adapted - base|`.

    Raises:
      UserError: it is 0.1 or more.
    """
    run = jax.jit(apply)
    ours, theirs, plain = (np.asarray(run(tree, batch), np.float32) for tree in (adapted, found, base))
    learned = np.abs(ours - plain).max()
    share = float(np.abs(theirs - ours).max() / learned) if learned else 0.0
    if not share < 0.1:
        raise UserError(
            f"{what}: reloaded, it differs from the adapter by {share:.3f} of what the adapter changes; expected below "
            "0.1. Nothing of it should be used."
        )
    return share


def read_merged(folder: Path, like: Any, backbone: Backbone, problem: Problem) -> Any:
    """Reads what `write_merged` has written."""
    names = peft_names(backbone, classifies=problem.classifies)
    tensors, _ = read_safetensors(folder / TENSORS)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    assert_names = names if names is not None else sj.io.NameMap(())
    return import_tensors(tensors.__getitem__, shapes, like, assert_names)[0]
