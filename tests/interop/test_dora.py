import dataclasses

import jax
import jax.numpy as jnp
import pytest

import subspace_jax as sj

torch = pytest.importorskip("torch")

from . import peft_models as pm  # noqa: E402


def test_forward_and_gradients():
    layer = pm.adapted(pm.Linear(), lora_alpha=6, use_dora=True)
    base = pm.array(layer.base_layer.weight).T
    start = sj.adapt({"w": base}, {"w": sj.dora(sj.lora(pm.RANK, alpha=6))}, key=jax.random.key(0))["w"]
    direction = dataclasses.replace(
        start.direction,
        a=pm.array(layer.lora_A["default"].weight).T,
        b=pm.array(layer.lora_B["default"].weight).T,
    )
    magnitude = pm.array(layer.lora_magnitude_vector["default"].weight)
    weight = dataclasses.replace(start, direction=direction, magnitude=magnitude)
    x = torch.randn(7, pm.INPUTS)
    expected, gradients = pm.run(layer, x)
    apply = sj.with_adapters(lambda w, x: x @ w)
    found = jax.jit(jax.grad(lambda w: jnp.sum(jnp.sin(apply(w, pm.array(x))))))(weight)
    pm.assert_close(apply(weight, pm.array(x)), expected)
    pm.assert_close(found.direction.a.T, gradients["lora_A.default.weight"])
    pm.assert_close(found.direction.b.T, gradients["lora_B.default.weight"])
    pm.assert_close(found.magnitude, gradients["lora_magnitude_vector.default.weight"])
    layer.merge()
    pm.assert_close(weight.materialize().T, layer.base_layer.weight.detach())


def test_magnitudes_at_the_start():
    layer = pm.adapted(pm.Linear(), moved=False, use_dora=True)
    base = pm.array(layer.base_layer.weight).T
    weight = sj.adapt({"w": base}, {"w": sj.dora(sj.lora(pm.RANK))}, key=jax.random.key(0))["w"]
    pm.assert_close(weight.magnitude, layer.lora_magnitude_vector["default"].weight.detach())
