"""Gemma 3 from a GGUF file: the same model as from a folder of Hugging Face, and the carried one speaks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax.assets import ASSETS, GROUPS, FetchError, is_available, join_parts
from subspace_jax.core import WeightFileError
from subspace_jax.models import Llama, LlamaConfig, greedy_decode, load_gemma3, unstack_layers
from tests.models.model_helpers import gguf_bytes, random_params, run

CONFIG = LlamaConfig(
    vocab_size=13,
    width=8,
    num_layers=7,
    num_heads=2,
    num_kv_heads=1,
    head_size=6,
    mlp_width=10,
    max_positions=32,
    epsilon=2.0**-20,  # exact in the four bytes that a file has for it
    rope_base=1e6,
    window=3,
    window_layers=(True,) * 5 + (False, True),
    window_rope_base=1e4,
    qk_norm=True,
    post_norms=True,
    unit_offset=True,
    scale_embeddings=True,
    activation="gelu_tanh",
)
# The names of the file, by those of the module; as llama.cpp writes them.
NAMES = {
    "attention/query/kernel": "attn_q",
    "attention/key/kernel": "attn_k",
    "attention/value/kernel": "attn_v",
    "attention/output/kernel": "attn_output",
    "attention/query_norm/scale": "attn_q_norm",
    "attention/key_norm/scale": "attn_k_norm",
    "attention_norm/scale": "attn_norm",
    "attention_post_norm/scale": "post_attention_norm",
    "mlp_norm/scale": "ffn_norm",
    "mlp_post_norm/scale": "post_ffw_norm",
    "mlp/gate/kernel": "ffn_gate",
    "mlp/up/kernel": "ffn_up",
    "mlp/down/kernel": "ffn_down",
}


def write(path, params, **entries):
    """Writes parameters as the file has them: matrices (out, in), norms with one added."""

    def stored(name, value):
        value = np.asarray(value, np.float32)
        if name.endswith("scale"):
            return value + 1.0
        return value.reshape(-1, value.shape[-1]).T if "output" in name else value.reshape(value.shape[0], -1).T

    tensors = {"token_embd.weight": np.asarray(params["embedding"]["embedding"])}
    tensors["output_norm.weight"] = stored("scale", params["norm"]["scale"])
    for layer in range(CONFIG.num_layers):
        for ours, theirs in NAMES.items():
            node = params["decoder"][f"layer_{layer}"]
            for part in ours.split("/"):
                node = node[part]
            tensors[f"blk.{layer}.{theirs}.weight"] = stored(ours, node)
    metadata = {"general.architecture": "gemma3"}
    metadata |= {f"gemma3.{key}": getattr(CONFIG, field) for field, key in FIELDS.items()} | entries
    shapes = {n: (t.shape, 0, np.ascontiguousarray(t, np.float32).tobytes()) for n, t in tensors.items()}
    path.write_bytes(gguf_bytes(metadata, shapes))
    return path


FIELDS = {
    "width": "embedding_length",
    "num_layers": "block_count",
    "num_heads": "attention.head_count",
    "num_kv_heads": "attention.head_count_kv",
    "head_size": "attention.key_length",
    "mlp_width": "feed_forward_length",
    "max_positions": "context_length",
    "epsilon": "attention.layer_norm_rms_epsilon",
    "rope_base": "rope.freq_base",
    "window": "attention.sliding_window",
}


@pytest.fixture(scope="module")
def params():
    return random_params(Llama(CONFIG), jnp.ones((1, 3), jnp.int32))


def test_a_file_gives_the_parameters_that_were_written(params, tmp_path):
    file = write(tmp_path / "m.gguf", params)
    for scan in (False, True):
        model = load_gemma3(path=file, scan_layers=scan)
        assert model.config == LlamaConfig(**{**CONFIG.__dict__, "scan_layers": scan})
        found = unstack_layers(model.params)
        for (path, one), other in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(params), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6, err_msg=str(path))
    first = load_gemma3(2, path=file)
    assert first.config.window_layers == (True, True)
    assert run(first.module, first.params, jnp.ones((1, 4), jnp.int32)).shape == (1, 4, 13)


def test_files_that_are_not_gemma_are_refused(params, tmp_path):
    with pytest.raises(ValueError, match="architecture 'llama'"):
        load_gemma3(path=write(tmp_path / "a.gguf", params, **{"general.architecture": "llama"}))
    with pytest.raises(WeightFileError, match="missing tensors"):
        load_gemma3(path=write(tmp_path / "b.gguf", params, **{"gemma3.block_count": 8}))
    with pytest.raises(WeightFileError, match="shape"):
        load_gemma3(path=write(tmp_path / "c.gguf", params, **{"gemma3.feed_forward_length": 12}))


def test_parts_are_joined_once_and_checked(tmp_path, monkeypatch):
    import hashlib

    folders = {f"part{i}": tmp_path / f"p{i}" for i in range(2)}
    for i, folder in enumerate(folders.values()):
        folder.mkdir()
        (folder / f"x.part{i:02}").write_bytes(b"ab" if i == 0 else b"cd")
    monkeypatch.setattr(
        "subspace_jax.assets._join.find_files", lambda name, suffix, cache: list(folders[name].glob(f"*{suffix}"))
    )
    digest = hashlib.sha256(b"abcd").hexdigest()
    with pytest.raises(FetchError, match="expected 0000"):
        join_parts(tuple(folders), ".part{:02}", "m/whole", "0000", cache=tmp_path / "cache")
    assert not list((tmp_path / "cache" / "m").iterdir())
    whole = join_parts(tuple(folders), ".part{:02}", "m/whole", digest, cache=tmp_path / "cache")
    assert whole.read_bytes() == b"abcd"
    (folders["part0"] / "x.part00").unlink()
    assert join_parts(tuple(folders), ".part{:02}", "m/whole", digest, cache=tmp_path / "cache") == whole


def test_the_license_keeps_it_out_of_what_is_fetched_unasked():
    assert not set(GROUPS["gemma3-270m"]) & set(GROUPS["all"])
    assert all("Gemma Terms" in ASSETS[name].license for name in GROUPS["gemma3-270m"])


TOKENIZERS = {}


def tokenizer_of(model):
    """Made once for both forms of the weights: it takes as long as they do."""
    if model.source not in TOKENIZERS:
        TOKENIZERS[model.source] = model.load_tokenizer()
    return TOKENIZERS[model.source]


@pytest.mark.carried
@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_the_carried_model_counts_and_knows_water(packed):
    if not all(is_available(name) for name in GROUPS["gemma3-270m"]):
        pytest.skip("python -m experiments fetch gemma3-270m; its license has terms to agree to")
    model = load_gemma3(scan_layers=True, packed=packed)
    tokenizer = tokenizer_of(model)
    prompts = [tokenizer.encode(text).ids for text in ("one, two, three, four,", "The chemical formula of water is H")]
    length = max(map(len, prompts))
    padded = [[0] * (length - len(prompt)) + prompt for prompt in prompts]
    real = np.arange(length) >= [[length - len(prompt)] for prompt in prompts]
    found = greedy_decode(model.module, model.params, padded, 1, mask=real)
    assert [tokenizer.decode(row.tolist()) for row in np.asarray(found)] == [" five", "2"]
