import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from subspace_jax.models import WeightFileError, encode_texts, load_minilm, mean_pool
from subspace_jax.models._minilm import bert_rules, read_safetensors
from subspace_jax.models._pretrained import assemble_params
from tests.models.model_helpers import random_params, run, tiny

SENTENCES = ("The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium.")


def vectors(model, tokens, mask):
    hidden = run(model.module, model.params, tokens, jnp.asarray(mask))
    pooled = np.asarray(mean_pool(hidden, jnp.asarray(mask)))
    return pooled / np.linalg.norm(pooled, axis=1, keepdims=True)


@pytest.mark.carried
def test_sentence_cosines_are_the_documented_ones(carried):
    pytest.importorskip("tokenizers")
    carried("minilm", "model.safetensors")
    model = load_minilm()
    tokens, mask = encode_texts(model.load_tokenizer(), SENTENCES, 16)
    unit = vectors(model, tokens, mask)
    cosines = [unit[i] @ unit[j] for i, j in ((0, 1), (0, 2), (1, 2))]
    np.testing.assert_allclose(cosines, [0.6660, 0.1046, 0.1411], atol=1e-4)
    scanned = load_minilm(scan_layers=True, remat=True)
    np.testing.assert_allclose(vectors(scanned, tokens, mask), unit, atol=1e-5)


@pytest.mark.carried
def test_fewer_layers_are_the_first_ones(carried):
    carried("minilm", "model.safetensors")
    whole, cut = load_minilm(), load_minilm(num_layers=2)
    assert set(cut.params["encoder"]) == {"layer_0", "layer_1"}
    np.testing.assert_array_equal(
        cut.params["encoder"]["layer_1"]["mlp"]["fc1"]["kernel"],
        whole.params["encoder"]["layer_1"]["mlp"]["fc1"]["kernel"],
    )


def pytorch_names(params):
    """The parameters of a tiny `Bert` as a BERT file names them, written out independently of the rules."""
    embeddings, named = params["embeddings"], {}
    for table in ("word", "position", "token_type"):
        named[f"embeddings.{table}_embeddings.weight"] = embeddings[table]["embedding"]
    pairs = [("embeddings.LayerNorm", embeddings["norm"])]
    for name, layer in params["encoder"].items():
        prefix = "encoder.layer." + name.removeprefix("layer_")
        parts = ("query", "key", "value")
        pairs.extend((f"{prefix}.attention.self.{part}", layer["attention"][part]) for part in parts)
        pairs.append((f"{prefix}.attention.output.dense", layer["attention"]["output"]))
        pairs.append((f"{prefix}.attention.output.LayerNorm", layer["attention_norm"]))
        pairs.append((f"{prefix}.intermediate.dense", layer["mlp"]["fc1"]))
        pairs.append((f"{prefix}.output.dense", layer["mlp"]["fc2"]))
        pairs.append((f"{prefix}.output.LayerNorm", layer["mlp_norm"]))
    for name, leaves in pairs:
        named[f"{name}.weight"] = leaves["kernel"].T if "kernel" in leaves else leaves["scale"]
        named[f"{name}.bias"] = leaves["bias"]
    return {name: np.ascontiguousarray(value) for name, value in named.items()}


def test_a_file_in_pytorch_names_gives_the_parameters_back(tmp_path):
    module, tokens = tiny("bert")
    params = random_params(module, tokens)
    save_file(pytorch_names(params), tmp_path / "m.safetensors")
    tensors = read_safetensors(tmp_path / "m.safetensors")
    found = assemble_params(tensors, bert_rules(module.config, 2), "f")
    np.testing.assert_array_equal(module.apply({"params": found}, tokens), module.apply({"params": params}, tokens))


def test_another_model_and_a_damaged_file_are_refused(tmp_path):
    module, tokens = tiny("bert")
    save_file(pytorch_names(random_params(module, tokens)), tmp_path / "m.safetensors")
    with pytest.raises(WeightFileError, match=r"missing tensors 'encoder\.layer\.2\."):
        load_minilm(tmp_path / "m.safetensors")
    (tmp_path / "m.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(WeightFileError, match=r"m\.safetensors"):
        load_minilm(tmp_path / "m.safetensors")


def test_fields_that_the_weights_decide_cannot_be_set(tmp_path):
    with pytest.raises(ValueError, match="width"):
        load_minilm(tmp_path, width=3)
    with pytest.raises(ValueError, match="expected 1 to 6"):
        load_minilm(tmp_path, num_layers=7)
