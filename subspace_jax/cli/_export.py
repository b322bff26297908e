"""Writes a run's weights for other programs, reads them back, and refuses what does not agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

import subspace_jax as sj
from subspace_jax.io import NameMap, export_tensors, import_tensors, read_safetensors, write_safetensors
from subspace_jax.models import GgufExportError, Precision, TextFormat, export_gguf, load_gguf

from ._backbone import Backbone
from ._errors import UserError
from ._files import read_json, write_json, write_text
from ._load_run import Run
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
    write_json(folder / CONFIG, _config(backbone, problem))
    if backbone.model.load_tokenizer is not None:
        backbone.tokenizer.save(str(folder / "tokenizer.json"))
    if backbone.model.text_format is not None and not problem.classifies:
        _write_text_format(folder, backbone.model.text_format)
    return folder


def write_gguf_file(path: Path, run: Run, precision: Precision) -> Any:
    """Writes a run's merged weights as a GGUF file; returns the parameters read back.

    Args:
      path: of the file.
      run: of a language model that came in a GGUF file.
      precision: of the matrices.

    Raises:
      UserError: the format cannot say what the run is; nothing is written.
    """
    if run.problem.classifies:
        raise UserError(f"{run.folder}: a GGUF file has no place for a head of classes; use --to hf.")
    try:
        export_gguf(path, sj.merge(run.adapted, keep_float32=True), run.backbone.model, precision=precision)
    except GgufExportError as error:
        raise UserError(str(error)) from error
    config = run.backbone.model.config
    return load_gguf(path, scan_layers=config.scan_layers, param_dtype=config.param_dtype).params


def _write_text_format(folder: Path, form: TextFormat) -> None:
    """Writes what texts begin and end with, in the files in which Hugging Face's library looks for it."""
    write_json(folder / "generation_config.json", {"eos_token_id": list(form.end_tokens)})
    write_json(folder / "tokenizer_config.json", {**form.special_tokens, "add_bos_token": form.bos_token is not None})
    if form.chat_template is not None:
        write_text(folder / "chat_template.jinja", form.chat_template)


def _config(backbone: Backbone, problem: Problem) -> dict[str, Any]:
    """What Hugging Face's library needs to build the module: the model's own entries where it came from there."""
    config = backbone.model.config
    if backbone.name.startswith("hf:"):
        entries = read_json(Path(backbone.name[3:]) / CONFIG)
        labels = {str(i): str(name) for i, name in enumerate(problem.classes)}
        # What is written is in full precision, whatever the folder held.
        kept = {name: value for name, value in entries.items() if name != "quantization_config"}
        return kept | ({"id2label": labels} if labels else {})
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


def probe(run: Run) -> dict[str, np.ndarray]:
    """Returns a small batch of arbitrary input on which two models can be compared."""
    return probe_of(run.backbone, run.problem, run.data.get("image_size", 0))


def probe_of(backbone: Backbone, problem: Problem, image_size: int = 0) -> dict[str, np.ndarray]:
    """Returns such a batch for a model; images have sides of `image_size`."""
    random = np.random.default_rng(0)
    if backbone.kind == "image encoder":
        return {"images": random.integers(0, 256, (2, image_size, image_size, 3)).astype(np.uint8)}
    tokens = random.integers(0, backbone.model.config.vocab_size, (2, 16)).astype(np.int32)
    ones = np.ones_like(tokens)
    return {"tokens": tokens, "mask": ones > 0} if problem.classifies else {"tokens": tokens, "segments": ones}


def read_merged(folder: Path, like: Any, backbone: Backbone, problem: Problem) -> Any:
    """Reads what `write_merged` has written."""
    names = peft_names(backbone, classifies=problem.classifies) or NameMap(())
    tensors, _ = read_safetensors(folder / TENSORS)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    return import_tensors(tensors.__getitem__, shapes, like, names)[0]
