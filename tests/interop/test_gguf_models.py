"""GGUF files of decoders: the logits of another reader, and files that go out and come back."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import subspace_jax as sj
from subspace_jax.models import GgufExportError, export_gguf, load_gguf, read_gguf
from tests.models.gguf_models import write_decoder

pytestmark = pytest.mark.interop
TOKENS = np.array([[5, 7, 9, 3, 11, 2, 40], [1, 0, 2, 4, 8, 16, 32]])
FILES = {
    "llama": {"architecture": "llama", "kinds": ("Q8_0", "Q5_0", "Q4_0")},
    "llama, untied, grouped": {
        "architecture": "llama",
        "kinds": ("F32",),
        "tied": False,
        "heads": 4,
        "kv_heads": 2,
        "metadata": {"general.alignment": 64},
    },
    "qwen2": {"architecture": "qwen2", "kinds": ("Q8_0", "F32"), "tied": False},
    "qwen3": {"architecture": "qwen3", "kinds": ("Q4_1", "Q8_0")},
    "gemma3": {"architecture": "gemma3", "kinds": ("Q8_0", "Q5_0"), "layers": 7},
}
TOKENIZER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "qwen2",
    "tokenizer.ggml.tokens": [chr(ord("!") + i) for i in range(48)],
    "tokenizer.ggml.token_type": [1] * 48,
    "tokenizer.ggml.merges": ["! !"],
    "tokenizer.ggml.eos_token_id": 3,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Written files by name, with random norms and biases."""
    folder = tmp_path_factory.mktemp("gguf")
    made = {}
    for name, options in FILES.items():
        options = dict(options)
        metadata = {**options.pop("metadata", {}), **TOKENIZER}
        path = folder / f"{name.replace(' ', '_').replace(',', '')}.gguf"
        made[name] = write_decoder(path, options.pop("architecture"), metadata=metadata, **options)
    return made


@pytest.mark.parametrize("name", FILES)
def test_logits_are_those_of_another_reader(name, files):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    file = files[name]
    config = transformers.AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    # Their reader leaves these at the sizes of the published models; llama.cpp takes the file's.
    config.head_dim = load_gguf(file).config.head_dim
    if name == "gemma3":
        config.query_pre_attn_scalar = config.head_dim
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, config=config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS)).logits.numpy()
    with jax.default_matmul_precision("highest"):
        for packed in (False, True):
            model = load_gguf(file, packed=packed, scan_layers=packed)
            apply = sj.with_adapters(model.module.apply)
            found = jax.jit(apply)({"params": model.params}, TOKENS)
            np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    assert model.config.tie_embeddings == ("output.weight" not in read_gguf(file).tensors)


def moved(model):
    found = sj.roles(lambda p, t: model.module.apply({"params": p}, t), model.params, jnp.asarray(TOKENS))
    adapted = sj.adapt(model.params, {"decoder/**/kernel": sj.qlora(2)}, key=jax.random.key(0), roles=found)
    trainable, frozen = sj.partition(adapted)
    return sj.combine(jax.tree.map(lambda v: v + 0.02, trainable), frozen)


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "stacked"])
@pytest.mark.parametrize("name", FILES)
def test_an_adapted_model_goes_out_and_comes_back(name, scan, files, tmp_path):
    gguf = pytest.importorskip("gguf")
    model = load_gguf(files[name], packed=True, scan_layers=scan)
    adapted = moved(model)
    apply = jax.jit(sj.with_adapters(lambda p: model.module.apply({"params": p}, TOKENS)))
    before, merged = files[name].read_bytes(), sj.merge(adapted)
    expected = np.asarray(apply(adapted))
    learned = np.abs(expected - apply(load_gguf(files[name], scan_layers=scan).params)).max()
    for precision, bound in (("f16", 0.1), ("f32", 1e-4)):
        out = tmp_path / f"{precision}.gguf"
        export_gguf(out, merged, model, precision=precision)
        again = load_gguf(out, scan_layers=scan)
        assert again.config == model.config
        assert np.abs(apply(again.params) - expected).max() < bound * learned
        ours, theirs = (gguf.GGUFReader(file) for file in (files[name], out))
        assert ours.fields.keys() <= theirs.fields.keys() | {"GGUF.kv_count"}
        for key, field in ours.fields.items():
            if not key.startswith("GGUF.") and key != "general.file_type":
                assert field.contents() == theirs.fields[key].contents(), key
        kinds = {tensor.name: tensor.tensor_type.name for tensor in theirs.tensors}
        matrices = {tensor.name for tensor in ours.tensors if len(tensor.shape) > 1}
        assert {kinds[key] for key in matrices} == {precision.upper()}
        assert {kinds[key] for key in kinds.keys() - matrices} == {"F32"}
        assert theirs.fields["general.file_type"].contents() == (1 if precision == "f16" else 0)
    assert files[name].read_bytes() == before


def test_what_a_file_cannot_say_is_refused_and_nothing_is_written(files, tmp_path):
    model = load_gguf(files["llama"], packed=True)
    dense = sj.merge(model.params)
    out = tmp_path / "out.gguf"
    with pytest.raises(GgufExportError, match="stand-in weight"):
        export_gguf(out, model.params, model)
    with pytest.raises(GgufExportError, match="1 layers are left of 2"):
        export_gguf(out, dense, load_gguf(files["llama"], 1))
    with pytest.raises(GgufExportError, match="own file"):
        export_gguf(files["llama"], dense, model)
    with pytest.raises(GgufExportError, match="no place for"):
        export_gguf(out, {**dense, "head": {"kernel": jnp.ones((64, 48))}}, model)
    with pytest.raises(GgufExportError, match="above what float16 can hold"):
        export_gguf(out, jax.tree.map(lambda v: v * 1e7, dense), model)
    with pytest.raises(GgufExportError, match="NaN"):
        export_gguf(out, jax.tree.map(lambda v: v * jnp.nan, dense), model)
    with pytest.raises(GgufExportError, match="not from a GGUF file"):
        export_gguf(out, dense, dataclasses.replace(model, source=None))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0}, "rope scaling 'yarn'"),
        ({"llama.expert_count": 8}, "expert_count=8"),
        ({"llama.attention.value_length": 16}, "values of 16"),
        ({"llama.attention.sliding_window": 16}, "sliding_window"),
    ],
)
def test_entries_that_the_reader_cannot_serve_are_refused(entries, message, tmp_path):
    file = write_decoder(tmp_path / "m.gguf", "llama", kinds=("F32",), metadata=entries)
    with pytest.raises(ValueError, match=message):
        load_gguf(file)
