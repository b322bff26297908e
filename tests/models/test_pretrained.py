import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax.models import PretrainedModel, WeightFileError, add_classifier
from subspace_jax.models._finish import finish_params
from subspace_jax.models._pretrained import (
    TensorRule,
    assemble_params,
    checked_depth,
    override_config,
)
from tests.models.model_helpers import random_params, tiny

RULES = {
    "a.weight": TensorRule((3, 2), "a/kernel", np.transpose),
    "b": TensorRule((2,), "c/d/bias"),
    "unused": TensorRule((1,), None),
}


def tensors(**changes):
    named = {"a.weight": np.arange(6.0).reshape(3, 2), "b": np.ones(2), "unused": np.zeros(1)}
    named.update({name.replace("_", "."): value for name, value in changes.items()})
    return {name: value for name, value in named.items() if value is not None}


def test_tensors_land_at_their_paths():
    tree = assemble_params(tensors(buffer=np.zeros(9)), RULES, "f", ignorable=lambda name: name == "buffer")
    assert tree["a"]["kernel"].tolist() == [[0, 2, 4], [1, 3, 5]]
    assert tree["c"]["d"]["bias"].tolist() == [1, 1]
    assert set(tree) == {"a", "c"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"b": None}, "missing tensors 'b', unexpected tensors none"),
        ({"other": np.ones(1)}, "missing tensors none, unexpected tensors 'other'"),
        ({"a_weight": np.ones((2, 3))}, r"'a.weight' has shape \(2, 3\); expected \(3, 2\)"),
        ({"unused": np.ones(2)}, "'unused' has shape"),
        ({"b": np.array([1.0, np.nan])}, "'b' holds NaN"),
        ({"b": np.array([1, 2])}, "'b' has dtype int64"),
    ],
)
def test_every_mismatch_is_refused_by_name(changes, message):
    with pytest.raises(WeightFileError, match=message):
        assemble_params(tensors(**changes), RULES, "f")


def test_parameters_are_cast_and_stacked_as_the_configuration_says():
    module, inputs = tiny("vit", scan_layers=True, param_dtype=jnp.bfloat16)
    plain, _ = tiny("vit")
    params = jax.tree.map(np.asarray, random_params(plain, inputs))
    found = finish_params(params, module.config)
    expected = jax.eval_shape(module.init, jax.random.key(0), inputs)["params"]
    assert jax.tree.map(lambda a: (a.shape, a.dtype), found) == jax.tree.map(lambda a: (a.shape, a.dtype), expected)


def test_only_free_fields_can_be_set():
    config = tiny("bert")[0].config
    assert override_config(config, {"remat": True}, ("remat",)).remat
    with pytest.raises(ValueError, match="'width'"):
        override_config(config, {"width": 3, "remat": True}, ("remat",))


def test_depth_is_checked():
    assert (checked_depth(None, 6, "n"), checked_depth(2, 6, "n")) == (6, 2)
    for wanted in (0, 7):
        with pytest.raises(ValueError, match="expected 1 to 6"):
            checked_depth(wanted, 6, "n")


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_a_head_is_added_to_an_encoder(kind):
    module, inputs = tiny(kind)
    params = random_params(module, inputs)
    model = add_classifier(PretrainedModel(module, params, module.config), 4, jax.random.key(0), pooling="cls")
    assert model.module.apply({"params": model.params}, inputs).shape == (2, 4)
    assert model.params["backbone"] is params
    expected = jax.eval_shape(model.module.init, jax.random.key(0), inputs)["params"]
    assert jax.tree.map(jnp.shape, model.params) == jax.tree.map(lambda a: a.shape, expected)


def test_a_language_model_gets_a_head_at_its_last_real_token():
    module, tokens = tiny("llama", tie_embeddings=False)
    params = random_params(module, tokens)
    found = add_classifier(PretrainedModel(module, params, module.config), 4, jax.random.key(0))
    assert found.params["backbone"].keys() == params.keys() - {"head"}
    mask = jnp.arange(7)[None] < jnp.array([[5], [3]])
    hidden = module.apply({"params": params}, tokens, mask, return_hidden=True)
    expected = hidden[jnp.arange(2), jnp.array([4, 2])] @ found.params["classifier"]["kernel"]
    np.testing.assert_allclose(found.module.apply({"params": found.params}, tokens, mask), expected, atol=1e-5)
    left = jnp.flip(mask, axis=1)
    hidden = module.apply({"params": params}, tokens, left, return_hidden=True)
    expected = hidden[:, -1] @ found.params["classifier"]["kernel"]
    np.testing.assert_allclose(found.module.apply({"params": found.params}, tokens, left), expected, atol=1e-5)
    with pytest.raises(ValueError, match="leave it out"):
        add_classifier(PretrainedModel(module, params, module.config), 4, jax.random.key(0), pooling="mean")


def test_no_head_for_what_is_no_backbone():
    with pytest.raises(TypeError, match="Dense"):
        add_classifier(PretrainedModel(nn.Dense(3), {}, None), 4, jax.random.key(0))
