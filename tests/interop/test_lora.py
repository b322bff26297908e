import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import subspace_jax as sj

torch = pytest.importorskip("torch")

from . import peft_models as pm  # noqa: E402


def ours(method, base, a, b, role=None):
    """The same adapter here: the method decides scale and shapes, PEFT the values."""
    weight = sj.adapt({"w": base}, {"w": method}, key=jax.random.key(0), roles={"w": role} if role else None)["w"]
    assert (weight.a.shape, weight.b.shape) == (a.shape, b.shape)
    return dataclasses.replace(weight, a=a, b=b)


def value_and_grads(model, weight, x):
    apply = sj.with_adapters(model)
    return apply(weight, x), jax.jit(jax.grad(lambda w: jnp.sum(jnp.sin(apply(w, x)))))(weight)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("alpha", [4, 11])
def test_linear(alpha, rslora):
    layer = pm.adapted(pm.Linear(), lora_alpha=alpha, use_rslora=rslora)
    weight = ours(
        sj.lora(pm.RANK, alpha=alpha, rank_stabilized=rslora),
        pm.array(layer.base_layer.weight).T,
        pm.array(layer.lora_A["default"].weight).T,
        pm.array(layer.lora_B["default"].weight).T,
    )
    assert weight.scale == pytest.approx(layer.scaling["default"])
    x = torch.randn(7, pm.INPUTS)
    expected, gradients = pm.run(layer, x)
    y, found = value_and_grads(lambda w, x: x @ w, weight, pm.array(x))
    pm.assert_close(y, expected)
    pm.assert_close(found.a.T, gradients["lora_A.default.weight"])
    pm.assert_close(found.b.T, gradients["lora_B.default.weight"])
    assert "base_layer.weight" not in gradients
    layer.merge()
    pm.assert_close(weight.materialize().T, layer.base_layer.weight.detach())


def test_the_start_has_the_same_distribution():
    """Kaiming-uniform over the inputs: largest entry, and standard deviation."""
    torch.manual_seed(0)
    big = torch.nn.Sequential()
    big.layer = torch.nn.Linear(4000, 8, bias=False)
    a = pm.adapted(big, moved=False).lora_A["default"].weight.detach().numpy()
    here = sj.adapt({"w": jnp.zeros((4000, 8))}, {"w": sj.lora(pm.RANK)}, key=jax.random.key(0))["w"].a
    assert np.abs(here).max() == pytest.approx(np.abs(a).max(), rel=1e-2)
    assert np.std(here) == pytest.approx(a.std(), rel=2e-2)


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"stride": (1, 2), "padding": (2, 0)}], ids=str)
def test_convolution(options):
    layer = pm.adapted(pm.Convolution(**options), lora_alpha=6)

    def kernel(tensor):
        return jnp.transpose(pm.array(tensor), (2, 3, 1, 0))

    a = kernel(layer.lora_A["default"].weight)
    weight = ours(
        sj.lora(pm.RANK, alpha=6),
        kernel(layer.base_layer.weight),
        a.reshape(-1, pm.RANK),
        kernel(layer.lora_B["default"].weight)[0, 0],
        sj.Role.conv(),
    )

    def model(w, x):
        stride, padding = options.get("stride", 1), options.get("padding", 0)
        strides, pads = ((n, n) if isinstance(n, int) else n for n in (stride, padding))
        y = lax.conv_general_dilated(x, w, strides, [(p, p) for p in pads], dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return y.transpose(0, 3, 1, 2)

    x = torch.randn(2, 5, 9, 8)
    expected, gradients = pm.run(layer, x)
    y, found = value_and_grads(model, weight, pm.array(x).transpose(0, 2, 3, 1))
    pm.assert_close(y, expected)
    back = found.a.reshape(a.shape).transpose(3, 2, 0, 1)
    pm.assert_close(back, gradients["lora_A.default.weight"])
    pm.assert_close(found.b.T, gradients["lora_B.default.weight"][..., 0, 0])


def test_embedding():
    layer = pm.adapted(pm.Embedding(), lora_alpha=6)
    weight = ours(
        sj.lora(pm.RANK, alpha=6),
        pm.array(layer.base_layer.weight),
        pm.array(layer.lora_embedding_A["default"]).T,
        pm.array(layer.lora_embedding_B["default"]).T,
        sj.Role.embedding(),
    )
    ids = torch.randint(0, 30, (4, 6))
    expected, gradients = pm.run(layer, ids)
    y, found = value_and_grads(lambda w, ids: jnp.take(w, ids, axis=0), weight, jnp.asarray(ids.numpy()))
    pm.assert_close(y, expected)
    pm.assert_close(found.a.T, gradients["lora_embedding_A.default"])
    pm.assert_close(found.b.T, gradients["lora_embedding_B.default"])
    fresh = pm.adapted(pm.Embedding(), moved=False)
    assert not fresh.lora_embedding_A["default"].any()
    assert fresh.lora_embedding_B["default"].any()
