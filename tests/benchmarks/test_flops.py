"""Operations of a LoRA step beside full fine-tuning's, as the compiler counts them: shapes only, nothing runs."""

import functools

import jax
import jax.numpy as jnp
import pytest

from benchmarks._measure import forward_cost, step_cost
from benchmarks._models import ModelConfig
from benchmarks._variants import Variant, variants

TOKENS = jax.ShapeDtypeStruct((4, 128), jnp.int32)
CASES = [
    ("unrolled", "lora", "full", 0.67),
    ("remat", "lora", "full", 0.73),
    ("scan", "lora", "full", 0.69),
    ("scan+remat", "lora", "full", 0.78),
    ("unrolled", "lora, NNX", "full, NNX", 0.67),
    ("remat", "lora, NNX", "full, NNX", 0.73),
]


# Of the unrolled layouts: each layer is compiled. Of a scan the compiler counts one layer, however many there are.
LAYERS = 2


@functools.cache
def variant(layout: str, name: str) -> Variant:
    config = ModelConfig(layout=layout) if "scan" in layout else ModelConfig(layout=layout, layers=LAYERS)
    (found,) = variants(config, 8, TOKENS, abstract=True, only=(name,))
    assert isinstance(found, Variant), found
    return found


@functools.cache
def flops(layout: str, name: str, bare: bool = False) -> float:
    return step_cost(variant(layout, name), TOKENS, bare=bare)[0].flops


@pytest.mark.parametrize(("layout", "name", "full", "most"), CASES)
def test_lora_on_all_kernels_spares_the_frozen_gradients(layout, name, full, most):
    ratio = flops(layout, name) / flops(layout, full)
    assert 0.6 < ratio <= most


@pytest.mark.parametrize("layout", ["unrolled", "scan"])
def test_clip_and_logged_norm_bring_no_frozen_gradient_back(layout):
    assert flops(layout, "lora") <= 1.01 * flops(layout, "lora", bare=True)


def test_late_freezing_and_materializing_pay_for_frozen_gradients():
    assert flops("unrolled", "optax.masked") >= 1.2 * flops("unrolled", "lora")
    assert flops("unrolled", "materialized") >= 1.2 * flops("unrolled", "lora")


def test_full_step_costs_what_the_arithmetic_says():
    # Three products per kernel and token, and six batched ones per attention; the rest is elementwise.
    tokens, length, width, hidden, vocabulary = 512, 128, 512, 2048, 1000
    kernels = LAYERS * (4 * width * width + 2 * width * hidden) + width * vocabulary
    products = 6 * tokens * kernels + 3 * LAYERS * 4 * tokens * length * width
    assert products < flops("unrolled", "full") < 1.02 * products


def test_inference_costs_the_factors_only():
    plain = forward_cost(variant("unrolled", "full"), TOKENS).flops
    assert forward_cost(variant("unrolled", "lora"), TOKENS).flops <= 1.03 * plain
