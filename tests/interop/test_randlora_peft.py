"""RandLoRA against PEFT: updates, outputs and gradients with PEFT's own bases."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import subspace_jax as sj

torch = pytest.importorskip("torch")

from . import peft_models as pm  # noqa: E402

SIZES = [(12, 20), (20, 12), (16, 16), (13, 18)]
KINDS = {"dense": {}, "sparse": {"sparse": True}, "very_sparse": {"very_sparse": True}}
RANK = 4


class Pair(torch.nn.Module):
    """The layer under test, and a larger one, so that the bases are larger than it needs."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.layer = torch.nn.Linear(inputs, outputs, bias=False)
        self.larger = torch.nn.Linear(24, 22, bias=False)

    def forward(self, x):
        return self.layer(x)


def peft_layer(size, *, moved=True, **options):
    torch.manual_seed(0)
    config = pm.peft.RandLoraConfig(
        r=RANK, target_modules=["layer", "larger"], randlora_dropout=0.0, projection_prng_key=3, **options
    )
    layer = pm.peft.get_peft_model(Pair(*size), config).float().base_model.model.layer
    for name in ("randlora_A", "randlora_B"):  # drawn in bfloat16, which .float() leaves as it is
        buffers = getattr(layer, name)
        buffers["default"] = buffers["default"].float()
    if moved:
        for parameters in (layer.randlora_lambda, layer.randlora_gamma):
            parameters["default"].data += 0.3 * torch.randn_like(parameters["default"])
    return layer


def ours(layer, size, **options):
    """The same adapter here, with PEFT's bases and scales."""
    params = {"layer": pm.array(layer.base_layer.weight).T, "larger": jnp.zeros((24, 22))}
    alpha = layer.scaling["default"] * RANK
    method = sj.randlora(RANK, alpha=alpha, scaling="peft", pairing="peft", **options)
    weight = sj.core.resolve_links(sj.adapt(params, {"*": method}, key=jax.random.key(0)))["layer"]
    found = {
        "basis_a": pm.array(layer.randlora_A["default"])[:, 0],
        "basis_b": jnp.transpose(pm.array(layer.randlora_B["default"]), (1, 2, 0)),
        "rank_scales": pm.array(layer.randlora_lambda["default"]).T,
        "feature_scales": pm.array(layer.randlora_gamma["default"]),
    }
    for name, value in found.items():
        assert getattr(weight, name).shape == value.shape, name
    return dataclasses.replace(weight, links=(), **found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_update_output_and_gradients(size, kind):
    layer = peft_layer(size, **KINDS[kind])
    weight = ours(layer, size, basis=kind)
    assert weight.scale == pytest.approx(layer.scaling["default"])
    pm.assert_close(weight.update(jnp.float32).T, layer.get_delta_weight("default"))
    x = torch.randn(7, size[0])
    expected, gradients = pm.run(layer, x)
    apply = sj.with_adapters(lambda w, x: x @ w)
    pm.assert_close(apply(weight, pm.array(x)), expected)
    found = jax.jit(jax.grad(lambda w: jnp.sum(jnp.sin(apply(w, pm.array(x))))))(weight)
    # The sine of large outputs turns rounding of 1e-6 of them into 1e-4 of the gradient.
    for one, name in (
        (found.rank_scales.T, "randlora_lambda.default"),
        (found.feature_scales, "randlora_gamma.default"),
    ):
        np.testing.assert_allclose(one, gradients[name], atol=2e-4 * np.abs(gradients[name]).max())
    layer.merge()
    pm.assert_close(weight.materialize().T, layer.base_layer.weight)


@pytest.mark.parametrize("alpha", [None, 7])
def test_scaling_and_starts(alpha):
    layer = peft_layer((12, 20), moved=False, **({} if alpha is None else {"randlora_alpha": alpha}))
    if alpha is None:
        assert layer.scaling["default"] == pytest.approx(
            640 / RANK
        )  # PEFT's alpha is 20 times its own default rank, 32
    params = {"layer": jnp.zeros((12, 20)), "larger": jnp.zeros((24, 22))}
    weight = sj.adapt(params, {"*": sj.randlora(RANK, alpha=alpha or 640, scaling="peft")}, key=jax.random.key(0))[
        "layer"
    ]
    assert weight.scale == pytest.approx(layer.scaling["default"])
    pm.assert_close(weight.rank_scales.T, layer.randlora_lambda["default"])
    pm.assert_close(weight.feature_scales, layer.randlora_gamma["default"])


@pytest.mark.parametrize("kind", KINDS)
def test_bases_have_the_same_distribution(kind):
    layer = peft_layer((12, 20), **KINDS[kind])
    theirs = layer.randlora_B["default"].numpy().transpose(1, 2, 0)
    weight = sj.adapt({"w": jnp.zeros((22, 24))}, {"w": sj.randlora(RANK, basis=kind)}, key=jax.random.key(0))["w"]
    basis = np.asarray(weight.basis_b)
    assert basis.shape == theirs.shape
    assert basis.std() == pytest.approx(theirs.std(), abs=5e-3)
    assert np.abs(basis).max() == pytest.approx(np.abs(theirs).max(), rel=0.1)
    assert (basis != 0).mean() == pytest.approx((theirs != 0).mean(), abs=0.05)
