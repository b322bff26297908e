import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax.models import (
    Vit,
    VitConfig,
    hidden_states,
    normalize_images,
    patch_features,
    small_vit,
    unstack_layers,
)
from tests.models.model_helpers import random_params, run, tiny
from tests.models.test_bert import torch_layer


@pytest.mark.interop
def test_tokens_equal_pytorch_on_another_grid_than_the_trained_one():
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    model, images = tiny("vit", epsilon=1e-12)
    params = random_params(model, images)

    def tensor(array):
        return torch.tensor(np.array(array))

    embeddings = params["embeddings"]
    kernel = tensor(embeddings["patch"]["kernel"]).permute(3, 2, 0, 1)
    patches = functional.conv2d(
        tensor(images).permute(0, 3, 1, 2), kernel, tensor(embeddings["patch"]["bias"]), stride=4
    )
    grid = tensor(embeddings["position"][:, 1:]).reshape(1, 3, 3, 32).permute(0, 3, 1, 2)
    patches = patches + functional.interpolate(grid, size=(2, 3), mode="bicubic", align_corners=False)
    cls = tensor(embeddings["cls"] + embeddings["position"][:, :1]).expand(2, 1, 32)
    h = torch.cat([cls, patches.flatten(2).transpose(1, 2)], dim=1)
    for i in range(2):
        block = params["encoder"][f"layer_{i}"]
        scales = [np.asarray(block[f"layer_scale{j}"]["scale"]) for j in (1, 2)]
        h = torch_layer(torch, block, norm_first=True, scales=scales, norms=("norm1", "norm2"))(h)
    norm = [tensor(params["norm"][name]) for name in ("scale", "bias")]
    expected = functional.layer_norm(h, (32,), *norm, eps=1e-12).detach().numpy()
    np.testing.assert_allclose(run(model, params, images), expected, atol=1e-5)


def test_the_final_norm_is_optional():
    model, images = tiny("vit")
    bare, _ = tiny("vit", final_norm=False)
    params = random_params(model, images)
    norm = params.pop("norm")
    tokens = np.asarray(run(bare, params, images), np.float64)
    centered = tokens - tokens.mean(-1, keepdims=True)
    expected = centered / np.sqrt(centered.var(-1, keepdims=True) + 1e-6) * norm["scale"] + norm["bias"]
    found = run(model, {**params, "norm": norm}, images)
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 8, 10, 3), (2, 8, 8, 1), (8, 8, 3)])
def test_wrong_images_are_refused(shape):
    with pytest.raises(ValueError, match=r"Vit: images\.shape"):
        Vit(small_vit()).init(jax.random.key(0), jnp.zeros(shape))


def test_an_impossible_configuration_is_refused():
    with pytest.raises(ValueError, match="num_heads"):
        VitConfig(width=100)


def test_images_are_normalized_per_channel():
    gray = np.full((1, 2, 2, 1), 51, np.uint8)
    expected = (0.2 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(normalize_images(gray)[0, 1, 1], expected, rtol=1e-5)
    np.testing.assert_allclose(normalize_images(np.full((1, 2, 2, 3), 0.2))[0, 0, 0], expected, rtol=1e-5)
    with pytest.raises(ValueError, match="channel"):
        normalize_images(np.zeros((2, 28, 28)))


@pytest.mark.parametrize("scan_layers", [False, True])
def test_hidden_states_are_what_blocks_hand_on(scan_layers):
    model, images = tiny("vit", scan_layers=scan_layers)
    params = random_params(model, images)
    states = hidden_states(model, params, images, (0, 2, 1))
    tokens = np.asarray(run(model, params, images), np.float64)
    last = np.asarray(states[1], np.float64)
    centered = (last - last.mean(-1, keepdims=True)) / np.sqrt(last.var(-1, keepdims=True) + model.config.epsilon)
    np.testing.assert_allclose(centered * params["norm"]["scale"] + params["norm"]["bias"], tokens, atol=1e-4)
    # The first block alone, as a model of one: what enters the second.
    one = Vit(dataclasses.replace(model.config, num_layers=1, scan_layers=False, final_norm=False))
    unrolled = unstack_layers(params)
    partial = {"embeddings": unrolled["embeddings"], "encoder": {"layer_0": unrolled["encoder"]["layer_0"]}}
    np.testing.assert_allclose(states[2], run(one, partial, images), atol=1e-5)
    features = patch_features(model, params, images, (1, 2))
    rows, columns = (side // model.config.patch_size for side in images.shape[1:3])
    expected = np.asarray(states[1:]).mean(0)[:, 1:].reshape(len(images), rows, columns, -1)
    np.testing.assert_allclose(features, expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"layers=\(3,\); expected some of 0 to 2"):
        hidden_states(model, params, images, (3,))
