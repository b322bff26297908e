"""Folders of CLIP load into our module and give the features and logits of their own library."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import subspace_jax as sj
from subspace_jax.core import WeightFileError
from subspace_jax.models import load, load_hf, unstack_layers

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.interop

TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TOWER |= {"initializer_range": 0.2}
TEXT = TOWER | {"vocab_size": 99, "max_position_embeddings": 16}
IMAGE = TOWER | {"hidden_size": 40, "image_size": 16, "patch_size": 4}
MODELS = {
    "quick": (TEXT | {"eos_token_id": 7}, IMAGE, {"projection_dim": 24}),
    "gelu": (TEXT | {"eos_token_id": 2, "hidden_act": "gelu"}, IMAGE | {"hidden_act": "gelu"}, {"projection_dim": 20}),
}
TOKENS = np.array([[5, 9, 7, 7, 1, 7], [5, 98, 30, 11, 7, 3], [2, 2, 40, 7, 98, 98]])
MASK = np.array([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])


def build(name):
    text, image, options = MODELS[name]
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=text, vision_config=image, initializer_factor=1.0, **options)
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((0.3 if parameter.ndim == 1 else 0.1) * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {name: tmp_path_factory.mktemp("clip") / name for name in MODELS}
    for name, folder in made.items():
        build(name).save_pretrained(folder)
    return made


def images():
    return np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)


def theirs(name, mask):
    with torch.no_grad():
        found = build(name)(
            input_ids=torch.tensor(TOKENS),
            pixel_values=torch.tensor(images()).permute(0, 3, 1, 2),
            attention_mask=None if mask is None else torch.tensor(mask),
        )
    return {
        "text": found.text_embeds.numpy(),
        "image": found.image_embeds.numpy(),
        "logits": found.logits_per_image.numpy(),
    }


def unit(v):
    return v / np.linalg.norm(v, axis=-1, keepdims=True)


@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "masked"])
@pytest.mark.parametrize("name", MODELS)
def test_features_and_logits_are_those_of_their_own_library(name, mask, folders):
    expected = theirs(name, mask)
    trees = []
    for scan in (False, True):
        model = load(f"hf:{folders[name]}", scan_layers=scan)

        @jax.jit
        def outputs(params, apply=model.module.apply):
            variables = {"params": params}
            text = apply(variables, TOKENS, mask, method="encode_text")
            return text, apply(variables, images(), method="encode_images"), apply(variables, TOKENS, images(), mask)

        with jax.default_matmul_precision("highest"):
            text, image, logits = outputs(model.params)
        np.testing.assert_allclose(unit(text), expected["text"], atol=1e-4)
        np.testing.assert_allclose(unit(image), expected["image"], atol=1e-4)
        np.testing.assert_allclose(logits, expected["logits"], atol=1e-4 * np.abs(expected["logits"]).max())
        trees.append(unstack_layers(model.params))
    for one, other in zip(*map(jax.tree.leaves, trees), strict=True):
        np.testing.assert_array_equal(one, other)


def test_both_rules_of_the_end_are_told_apart(folders):
    """The same weights, read at the first end token and at the highest id."""
    found = []
    for name in MODELS:
        model = load_hf(folders[name])
        assert model.config.end_token == {"quick": 7, "gelu": None}[name]
        other = dataclasses.replace(model.config, end_token=None if name == "quick" else 7)
        one, two = (
            type(model.module)(c).apply({"params": model.params}, TOKENS, method="encode_text")
            for c in (model.config, other)
        )
        found.append(np.abs(one - two).max(axis=-1) > 1e-3)
    assert found[0].any()
    assert found[1].any()


def test_names_go_both_ways_and_an_adapter_into_their_model(folders, tmp_path):
    model = load_hf(folders["quick"], scan_layers=True)
    state = build("quick").state_dict()
    exported = sj.io.export_tensors(model.params, model.names)
    assert exported.keys() == state.keys()
    for name, tensor in exported.items():
        np.testing.assert_array_equal(tensor, state[name].numpy())
    roles = sj.roles(lambda p, t, x: model.module.apply({"params": p}, t, x), model.params, TOKENS, images())
    rules = {("*/encoder/**/query/kernel", "*/encoder/**/fc1/kernel", "image_projection/kernel"): sj.lora(2)}
    adapted = sj.adapt(model.params, rules, key=jax.random.key(0), roles=roles)
    adapted = sj.core.map_with_paths(
        lambda path, leaf: dataclasses.replace(leaf, b=leaf.b + 0.1) if sj.core.is_weight(leaf) else leaf, adapted
    )
    apply = jax.jit(sj.with_adapters(lambda p: model.module.apply({"params": p}, TOKENS, images())))
    with jax.default_matmul_precision("highest"):
        ours = apply(adapted)
        assert float(jnp.abs(ours - apply(model.params)).max()) > 1e-2
    sj.save_peft(tmp_path / "peft", adapted, model.params, model.names)
    tuned = peft.PeftModel.from_pretrained(build("quick"), tmp_path / "peft").eval()
    with torch.no_grad():
        pixels = torch.tensor(images()).permute(0, 3, 1, 2)
        expected = tuned(input_ids=torch.tensor(TOKENS), pixel_values=pixels).logits_per_image.numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-4 * np.abs(expected).max())


@pytest.fixture
def copy(folders, tmp_path):
    def changed(**entries):
        target = tmp_path / "copy"
        shutil.copytree(folders["quick"], target)
        config = json.loads((target / "config.json").read_text())
        for name, value in entries.items():
            config[name] = {**config[name], **value} if isinstance(value, dict) and name in config else value
        (target / "config.json").write_text(json.dumps(config))
        return target

    return changed


def test_the_older_spelling_means_the_same(copy, folders):
    entries = json.loads((folders["quick"] / "config.json").read_text())
    older = {f"{name}_config_dict": entries[f"{name}_config"] for name in ("text", "vision")}
    folder = copy(text_config=None, vision_config=None, **older)
    assert load_hf(folder).config == load_hf(folders["quick"]).config


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"text_config": {"hidden_act": "relu"}}, "text_config: hidden_act='relu'"),
        ({"vision_config": {"num_channels": 1}}, "num_channels=1"),
        ({"vision_config": {"image_size": 18}}, "no multiple of patch_size=4"),
        ({"vision_config": {"image_size": 32}}, "do not fit"),
        ({"text_config": {"num_attention_heads": 5}}, "impossible entries"),
        ({"projection_dim": 30}, "do not fit"),
    ],
)
def test_entries_that_cannot_be_served_are_refused_by_name(copy, entries, message):
    with pytest.raises(WeightFileError, match=message):
        load_hf(copy(**entries))
