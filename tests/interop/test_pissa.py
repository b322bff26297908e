import jax
import jax.numpy as jnp
import numpy as np
import pytest

import subspace_jax as sj

torch = pytest.importorskip("torch")

from . import peft_models as pm  # noqa: E402


def decaying_linear():
    """A layer whose singular values fall, so that two randomized methods can find the same directions."""
    rng = np.random.default_rng(0)
    u, v = np.linalg.qr(rng.normal(size=(pm.OUTPUTS,) * 2))[0], np.linalg.qr(rng.normal(size=(pm.INPUTS,) * 2))[0]
    weight = (u * 2.0 ** -np.arange(pm.OUTPUTS)) @ v[: pm.OUTPUTS]
    model = pm.Linear()
    model.layer.weight.data = torch.tensor(weight, dtype=torch.float32)
    return model, jnp.asarray(weight.T, jnp.float32)


@pytest.mark.parametrize("alpha", [4, 10])
@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("pissa", lambda alpha: sj.pissa(pm.RANK, alpha=alpha, svd="exact")),
        ("pissa_niter_16", lambda alpha: sj.pissa(pm.RANK, alpha=alpha, iterations=16)),
    ],
)
def test_product_and_rewritten_base(name, method, alpha):
    model, w = decaying_linear()
    layer = pm.adapted(model, moved=False, init_lora_weights=name, lora_alpha=alpha)
    weight = sj.adapt({"w": w}, {"w": method(alpha)}, key=jax.random.key(0))["w"]
    product = (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach().numpy()
    np.testing.assert_allclose((weight.a @ weight.b).T, product, atol=1e-5)
    np.testing.assert_allclose(weight.base.T, layer.base_layer.weight.detach(), atol=1e-5)
    assert weight.scale == layer.scaling["default"]
    x = torch.randn(7, pm.INPUTS)
    found = sj.with_adapters(lambda w, x: x @ w)(weight, pm.array(x))
    np.testing.assert_allclose(found, layer(x).detach(), rtol=1e-5, atol=1e-5)


def test_gradients_at_the_start():
    """In terms that no sign of a singular vector enters: of the product, to first order."""
    model, w = decaying_linear()
    layer = pm.adapted(model, moved=False, init_lora_weights="pissa", lora_alpha=10)
    weight = sj.adapt({"w": w}, {"w": sj.pissa(pm.RANK, alpha=10, svd="exact")}, key=jax.random.key(0))["w"]
    x = torch.randn(7, pm.INPUTS)
    _, gradients = pm.run(layer, x)
    apply = sj.with_adapters(lambda w, x: x @ w)
    found = jax.jit(jax.grad(lambda w: jnp.sum(jnp.sin(apply(w, pm.array(x))))))(weight)
    a, b = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    expected = b.detach().numpy() @ gradients["lora_A.default.weight"]
    expected += gradients["lora_B.default.weight"] @ a.detach().numpy()
    np.testing.assert_allclose((found.a @ weight.b + weight.a @ found.b).T, expected, rtol=1e-5, atol=1e-5)
