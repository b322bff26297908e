"""`finetune --method qlora` on a model that stays in a file's blocks."""

import json

import jax
import numpy as np
import pytest

import subspace_jax as sj
from subspace_jax.cli import load_run
from subspace_jax.models import CARRIED, load_gguf
from tests.cli.conftest import QUICK, WORDS, word_tokenizer, write_lines
from tests.models.gguf_models import write_packed

pytest.importorskip("matplotlib")
ROWS = [{"prompt": "what is next : one two", "completion": "three"}, {"prompt": "two three", "completion": "four"}] * 8


@pytest.fixture
def packed_model(tmp_path, monkeypatch):
    """A carried model in a GGUF file, with a tokenizer of words."""
    import dataclasses

    file = write_packed(tmp_path / "m.gguf", vocab=len(WORDS) + 4)

    def load(**overrides):
        model = load_gguf(file, **overrides)
        form = dataclasses.replace(model.text_format, end_tokens=(1,), special_tokens={"eos_token": "<end>"})
        return dataclasses.replace(model, load_tokenizer=word_tokenizer, text_format=form)

    monkeypatch.setitem(CARRIED, "tiny-gguf", (load, "minilm"))
    for where in ("subspace_jax.cli._backbone.has_blocks", "subspace_jax.models.has_blocks"):
        monkeypatch.setattr(where, lambda name: name == "tiny-gguf")
    return "tiny-gguf"


def test_a_run_on_packed_blocks_learns_and_is_loaded_again(packed_model, shell, tmp_path):
    data = write_lines(tmp_path / "rows.jsonl", ROWS)
    out = tmp_path / "run"
    options = ("--model", packed_model, "--method", "qlora", "--epochs", 2, *QUICK)
    done = shell("finetune", data, *options, "--out", out)
    assert done.code == 0, done.err
    names = sj.io.read_safetensors(out / "adapter.safetensors")[0]
    assert {name.rsplit("/", 1)[1] for name in names} == {"a", "b"}
    assert (out / "peft" / "adapter_model.safetensors").exists()
    run = load_run(out)
    assert isinstance(run.problem.params["embedding"]["embedding"], sj.weights.Packed)
    assert max(float(abs(v).max()) for v in jax.tree.leaves(sj.partition(run.adapted)[0])) > 0
    done = shell("evaluate", out, data, "--out", tmp_path / "e")
    assert done.code == 0, done.err
    assert np.isfinite(json.loads((tmp_path / "e" / "metrics.json").read_text())["loss"])
    for command in (("explain", out, "**/query/*"), ("generate", out, "one two")):
        done = shell(*command)
        assert done.code == 0, done.err
    done = shell("export", out, tmp_path / "peft", "--to", "peft")
    assert done.code == 0, done.err


def test_other_methods_get_the_dense_model(packed_model, shell, tmp_path):
    data = write_lines(tmp_path / "rows.jsonl", ROWS)
    out = tmp_path / "run"
    done = shell(
        "finetune", data, "--model", packed_model, "--compare", "lora,qlora", "--steps", 1, *QUICK, "--out", out
    )
    assert done.code == 0, done.err
    kernel = load_run(out / "qlora").adapted["decoder"]["layers"]["mlp"]["up"]["kernel"]
    assert isinstance(kernel.base, sj.weights.NF4)
