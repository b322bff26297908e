"""Folders of Hugging Face's library load into our modules and compute what its own models compute."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import subspace_jax as sj
from subspace_jax.core import WeightFileError
from subspace_jax.io import AdapterFileError
from subspace_jax.models import greedy_decode, load, load_hf, unstack_layers

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.interop

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
DECODER = SIZES | {"num_key_value_heads": 2, "initializer_range": 0.2}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32, "rope_theta": 10000.0}
MODELS = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", DECODER),
    "llama biased": ("LlamaConfig", "LlamaForCausalLM", DECODER | {"attention_bias": True, "mlp_bias": True}),
    "llama rope": ("LlamaConfig", "LlamaForCausalLM", DECODER | {"rope_parameters": LLAMA3, "head_dim": 16}),
    "smollm2": ("LlamaConfig", "LlamaForCausalLM", DECODER | {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", "MistralForCausalLM", DECODER | {"sliding_window": 5}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", DECODER),
    "qwen2 windows": (
        "Qwen2Config",
        "Qwen2ForCausalLM",
        DECODER | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", DECODER | {"head_dim": 16}),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        DECODER
        | {"head_dim": 16, "sliding_window": 5, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]}
        | {"query_pre_attn_scalar": 20, "pad_token_id": None},
    ),
    "bert": ("BertConfig", "BertModel", SIZES | {"initializer_range": 0.2}),
    "roberta": ("RobertaConfig", "RobertaModel", SIZES | {"initializer_range": 0.2, "type_vocab_size": 1}),
    "vit": (
        "ViTConfig",
        "ViTModel",
        {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"image_size": 16, "patch_size": 4, "initializer_range": 0.2},
    ),
    "dinov2": (
        "Dinov2Config",
        "Dinov2Model",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16, "patch_size": 4}
        | {"layerscale_value": 0.7, "initializer_range": 0.2},
    ),
}
TEXT = ("bert", "roberta")
IMAGES = ("vit", "dinov2")


def build(name):
    """A model of random weights, biases and norms among them."""
    config, module, options = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, module)(getattr(transformers, config)(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Saved folders by name, made when they are asked for."""
    made = {}

    def folder(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("hf") / name.replace(" ", "_")
            build(name).save_pretrained(made[name])
        return made[name]

    return folder


def theirs(name, inputs, mask=None):
    model = build(name)
    with torch.no_grad():
        if name in IMAGES:
            return model(pixel_values=torch.tensor(inputs).permute(0, 3, 1, 2)).last_hidden_state.numpy()
        found = model(input_ids=torch.tensor(inputs), attention_mask=None if mask is None else torch.tensor(mask))
    return (found.last_hidden_state if name in TEXT else found.logits).numpy()


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_computes_what_its_own_library_computes(name, folders):
    random = np.random.default_rng(0)
    mask = np.ones((2, 12), np.int64)
    if name in IMAGES:
        inputs, arguments = random.normal(size=(2, 16, 16, 3)).astype(np.float32), ()
    else:
        inputs = random.integers(3, 99, (2, 12))
        if name in TEXT:
            mask[1, 8:], inputs[1, 8:] = 0, 1
        arguments = (mask,)
    expected = theirs(name, inputs, *arguments)
    with jax.default_matmul_precision("highest"):
        trees = []
        for scan in (False, True):
            model = load(f"hf:{folders(name)}", scan_layers=scan)
            found = np.asarray(model.module.apply({"params": model.params}, jnp.asarray(inputs), *arguments))
            real = mask.astype(bool) if name in TEXT else ...
            np.testing.assert_allclose(found[real], expected[real], atol=1e-4 * np.abs(expected).max())
            trees.append(unstack_layers(model.params))
    for one, other in zip(*map(jax.tree.leaves, trees), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", ["llama rope", "qwen2 windows", "gemma3"])
def test_generation_with_a_cache_continues_as_their_own(name, folders):
    prompt = np.random.default_rng(1).integers(3, 99, (1, 9))
    with torch.no_grad():
        expected = build(name).generate(
            torch.tensor(prompt), max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    model = load_hf(folders(name), scan_layers=True)
    found = greedy_decode(model.module, model.params, prompt, 8)
    np.testing.assert_array_equal(found[0], expected[0, 9:].numpy())


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "bert", "vit"])
def test_an_adapter_goes_back_into_their_model(name, folders, tmp_path):
    model = load_hf(folders(name), scan_layers=True)
    rules = {"**/query/kernel": sj.lora(2)}
    adapted = sj.adapt(model.params, rules, key=jax.random.key(0), roles=roles_of(name, model))
    adapted = sj.core.map_with_paths(
        lambda path, leaf: dataclasses.replace(leaf, b=leaf.b + 0.1) if sj.core.is_weight(leaf) else leaf, adapted
    )
    plain, torch_model = model.names, build(name)
    merged = sj.io.export_tensors(sj.merge(adapted), plain)
    shapes = {key: tuple(value.shape) for key, value in torch_model.state_dict().items()}
    assert {key: value.shape for key, value in merged.items()}.items() <= shapes.items()
    sj.save_peft(tmp_path / "peft", adapted, model.params, plain)
    tuned = peft.PeftModel.from_pretrained(torch_model, tmp_path / "peft").merge_and_unload().state_dict()
    for key, value in merged.items():
        np.testing.assert_allclose(tuned[key].numpy(), value, atol=1e-5, err_msg=key)


def roles_of(name, model):
    inputs = jnp.zeros((1, 16, 16, 3)) if name in IMAGES else jnp.ones((1, 4), jnp.int32)
    return sj.roles(lambda p, x: model.module.apply({"params": p}, x), model.params, inputs)


def test_shards_are_read_one_tensor_at_a_time_and_placed(folders, tmp_path):
    build("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    seen = []

    def place(path, array):
        seen.append(path)
        return jax.device_put(array)

    model = load_hf(tmp_path, place=place, param_dtype=jnp.bfloat16)
    whole = load_hf(folders("llama"), param_dtype=jnp.bfloat16)
    assert len(seen) == len(jax.tree.leaves(whole.params))
    for one, other in zip(jax.tree.leaves(model.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(AdapterFileError, match=shard.name):
        load_hf(tmp_path)
    shard.write_bytes(content[:-8])
    with pytest.raises(AdapterFileError, match=shard.name):
        load_hf(tmp_path)
    shutil.copy(sorted(tmp_path.glob("*.safetensors"))[0], shard)
    with pytest.raises(AdapterFileError, match="two versions"):
        load_hf(tmp_path)


@pytest.fixture
def copy(folders, tmp_path):
    """A copy of a folder with entries of its config.json changed."""

    def changed(name, **entries):
        target = tmp_path / "copy"
        shutil.copytree(folders(name), target)
        config = json.loads((target / "config.json").read_text()) | entries
        (target / "config.json").write_text(json.dumps(config))
        return target

    return changed


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"model_type": "mamba"}, "model_type='mamba'"),
        ({"hidden_act": "relu"}, "hidden_act='relu'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type='yarn'"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config='awq'"),
        ({"num_hidden_layers": 2}, "of no use"),
        ({"num_hidden_layers": 4}, "do not fit"),
        ({"attention_bias": True}, "do not fit"),
        ({"intermediate_size": 40}, "do not fit"),
        ({"tie_word_embeddings": True}, "another table"),
        ({"num_key_value_heads": 3}, "impossible entries"),
    ],
)
def test_entries_that_cannot_be_served_are_refused_by_name(copy, entries, message):
    with pytest.raises(WeightFileError, match=message):
        load_hf(copy("llama", **entries))


def test_the_older_spelling_means_the_same(copy, folders):
    older = {"rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}, "rope_theta": 10000.0}
    folder = copy("llama rope", rope_parameters=None, dtype=None, torch_dtype="float32", **older)
    assert load_hf(folder).config == load_hf(folders("llama rope")).config
    assert load_hf(folder).config.rope_scaling.factor == 8.0


def test_a_tokenizer_of_another_model_is_refused(copy):
    tokenizers = pytest.importorskip("tokenizers")
    folder = copy("llama")
    words = {f"w{i}": i for i in range(120)}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0")).save(str(folder / "tokenizer.json"))
    with pytest.raises(WeightFileError, match="up to 119, and the embedding table has 99 rows"):
        load_hf(folder).load_tokenizer()


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(WeightFileError, match=r"no config\.json"):
        load_hf(tmp_path)
