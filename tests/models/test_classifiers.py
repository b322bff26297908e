import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax.models import BertClassifier, VitClassifier, mean_pool, pool_tokens
from tests.models.model_helpers import random_params, run, tiny
from tests.tolerances import tolerance


def test_mean_pool_averages_real_tokens_only(rng):
    hidden = rng.normal(size=(3, 4, 5)).astype(np.float32)
    mask = np.array([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    dirty = hidden.copy()
    dirty[0, 3] = np.nan
    expected = [hidden[0, :2].mean(0), hidden[1].mean(0), np.zeros(5)]
    np.testing.assert_allclose(mean_pool(jnp.asarray(dirty), jnp.asarray(mask)), expected, atol=tolerance(size=4))
    np.testing.assert_allclose(mean_pool(jnp.asarray(hidden)), hidden.mean(1), atol=tolerance(size=4))


def test_token_pooling(rng):
    tokens = rng.normal(size=(2, 5, 3)).astype(np.float32)
    cls, mean = tokens[:, 0], tokens[:, 1:].mean(1)
    for pooling, expected in (("cls", cls), ("mean", mean), ("cls+mean", np.concatenate([cls, mean], -1))):
        np.testing.assert_allclose(pool_tokens(jnp.asarray(tokens), pooling), expected, atol=tolerance(size=4))
    with pytest.raises(ValueError, match="max"):
        pool_tokens(jnp.asarray(tokens), "max")


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_bert_logits_are_the_head_of_the_pooled_backbone(pooling):
    backbone, tokens = tiny("bert")
    model = BertClassifier(backbone.config, 3, pooling)
    params = random_params(model, tokens)
    mask = jnp.arange(7)[None] < jnp.array([[5], [3]])
    hidden = np.asarray(run(backbone, params["backbone"], tokens, mask))
    pooled = hidden[:, 0] if pooling == "cls" else np.stack([hidden[0, :5].mean(0), hidden[1, :3].mean(0)])
    expected = pooled @ params["classifier"]["kernel"] + params["classifier"]["bias"]
    np.testing.assert_allclose(run(model, params, tokens, mask), expected, atol=1e-4)


@pytest.mark.parametrize("pooling", ["mean", "cls", "cls+mean"])
def test_vit_logits_are_the_head_of_the_pooled_backbone(pooling):
    backbone, images = tiny("vit")
    model = VitClassifier(backbone.config, 3, pooling)
    params = random_params(model, images)
    tokens = np.asarray(run(backbone, params["backbone"], images))
    parts = {"cls": [tokens[:, 0]], "mean": [tokens[:, 1:].mean(1)]}
    parts["cls+mean"] = parts["cls"] + parts["mean"]
    expected = np.concatenate(parts[pooling], -1) @ params["classifier"]["kernel"] + params["classifier"]["bias"]
    np.testing.assert_allclose(run(model, params, images), expected, atol=1e-4)


def test_unknown_pooling_is_refused():
    backbone, tokens = tiny("bert")
    with pytest.raises(ValueError, match=r"BertClassifier\.pooling='max'"):
        BertClassifier(backbone.config, 3, "max").init(jax.random.key(0), tokens)
