"""Operations of a step with every adapter, as the compiler counts them, beside the products that it needs."""

import functools

import pytest

from benchmarks import _arithmetic as arithmetic
from benchmarks import adapters
from benchmarks._measure import step_cost
from benchmarks._models import linen

# Full width, since the share of what is no product grows as models shrink; one layer, to compile less.
CONFIG = adapters.Config(layers=1, rounds=0, longer=0)
# What is beside the products: norms, softmax, GELU, the optimizer, and what a method computes of its small parts.
MOST = {
    "lora": 1.02,
    "dora": 1.03,
    "randlora": 1.02,
    "oft": 1.03,
    "ssf": 1.02,
    "loldu": 1.02,
    "orthogonal_adaptation": 1.02,
    "block_lora": 1.02,
    "comp_lora": 1.02,
}


@functools.cache
def plain():
    return linen(CONFIG.model(), CONFIG.tokens())


@functools.cache
def measured(name, targets):
    kernels, tokens = adapters.TARGETS[targets], CONFIG.tokens()
    arm = adapters.arms(CONFIG, 81_000, 7)[name]
    flops = step_cost(adapters.variant(plain(), name, arm, kernels, tokens), tokens)[0].flops
    sizes = {
        "width": CONFIG.width,
        "mlp_width": CONFIG.mlp_width,
        "layers": CONFIG.layers,
        "vocabulary": CONFIG.vocabulary,
    }
    rows = CONFIG.sequences * CONFIG.length
    return flops, arithmetic.transformer(sizes, rows, CONFIG.length, arm.products, lambda kernel: kernel in kernels)


@pytest.mark.parametrize("name", MOST)
def test_a_step_computes_what_it_must(name):
    flops, products = measured(name, "all")
    assert products < flops < MOST[name] * products


@pytest.mark.parametrize(
    ("name", "published"), [(n, adapters.PUBLISHED_BY_PEFT[n]) for n in ("randlora", "dora", "oft")]
)
def test_beside_lora_less_than_what_peft_takes(name, published):
    ours = measured(name, "query and value")[0] / measured("lora", "query and value")[0]
    assert ours < 1 + 0.6 * (published - 1)
