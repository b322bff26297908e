"""A step in bfloat16, lowered for CUDA on whatever this runs on: what is large is not converted to float32.

Only the program's text is looked at, so no GPU is needed and none is claimed to have run.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import subspace_jax as sj
from subspace_jax.models import Llama, small_llama

KERNELS = "decoder/**/kernel"
CONVERSION = re.compile(r"stablehlo\.convert %\S+ : \(tensor<([\dx]+)xbf16>\) -> tensor<[\dx]+xf32>")
PRECISE = "precision = [HIGHEST, HIGHEST]"

# Method, conversions of arrays of a kernel's size and products of full precision that each kernel may have, and why.
CASES = {
    "lora": (lambda: sj.lora(4), 0, 0),
    "pissa": (lambda: sj.pissa(4), 0, 0),
    "lora_xs": (lambda: sj.methods.lora_sb.lora_xs(4), 0, 0),
    "matryoshka": (lambda: sj.matryoshka(sj.lora(4)), 0, 0),
    "soka": (lambda: sj.soka(4), 0, 0),
    "flora": (lambda: sj.flora(4), 0, 0),
    # Both in the branch that forms the sum where columns cancel, which no step takes before they do.
    "dora": (lambda: sj.dora(sj.lora(4)), 1, 1),
    # The gradient of the scaled copies of a basis, as large as a square kernel, is summed in float32.
    "randlora": (lambda: sj.randlora(8), 1, 0),
    # The derivative of the Cayley transform, of blocks of 8 x 8: in 8 bits of mantissa they would be no rotations.
    "oft": (lambda: sj.oft(8), 0, 2),
    "osf": (lambda: sj.osf(8), 0, 0),
}


@functools.cache
def setup():
    module = Llama(small_llama(num_layers=1, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16))
    tokens = jnp.zeros((2, 48), jnp.int32)
    params = jax.jit(module.init)(jax.random.key(0), tokens)["params"]

    def model(params, tokens):
        return module.apply({"params": params}, tokens)

    return model, params, tokens


def lowered(method):
    """The text of a step's program for CUDA, how many kernels there are, and the shapes that one can have."""
    model, params, tokens = setup()

    def loss(adapted, batch, key):
        logits = sj.with_adapters(model)(adapted, batch)[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), batch[:, 1:]).mean()

    roles = sj.roles(model, params, tokens)
    optimizer = optax.adam(1e-3)
    step = sj.training.make_train_step(loss, optimizer)

    def start(params):
        adapted = sj.adapt(params, {KERNELS: method}, key=jax.random.key(1), roles=roles)
        state = sj.training.init_train_state(adapted, optimizer, jax.random.key(0), compute_dtype=jnp.bfloat16)
        return adapted, state

    adapted, state = jax.eval_shape(start, params)
    program = jax.jit(lambda state, batch: step(state, batch)).trace(state, tokens)
    rows = [row for row in sj.summary(adapted) if row.method]
    sides = [roles[row.path].sizes(row.shape) for row in rows]
    shapes = {row.shape for row in rows} | set(sides) | {(n, m) for m, n in sides}
    return program.lower(lowering_platforms=("cuda",)).as_text(), len(rows), shapes


def converted(text, shapes):
    """How many arrays of the shapes are converted from bfloat16 to float32."""
    return sum(tuple(map(int, found.split("x"))) in shapes for found in CONVERSION.findall(text))


@pytest.mark.parametrize("name", CASES)
def test_frozen_weights_stay_in_bfloat16(name):
    make, conversions, precise = CASES[name]
    text, count, shapes = lowered(make())
    assert converted(text, shapes) <= conversions * count
    assert text.count(PRECISE) <= precise * count
    assert text.count("stablehlo.dot_general") > count


def test_a_converted_weight_is_seen():
    """The same count of weights that learn whole, which are kept in float32 and whose gradients are widened."""
    text, count, shapes = lowered(sj.full())
    assert converted(text, shapes) == count


@pytest.mark.parametrize("name", ["dora", "randlora", "oft", "osf"])
def test_outputs_are_those_of_float32_to_bfloat16(name):
    model, params, tokens = setup()
    random = np.random.default_rng(0)
    tokens = random.integers(0, 64, tokens.shape)
    adapted = sj.adapt(
        params, {KERNELS: CASES[name][0]()}, key=jax.random.key(1), roles=sj.roles(model, params, tokens)
    )
    trainable, frozen = sj.partition(adapted)
    moved = jax.tree.map(lambda v: v + jnp.asarray(0.02 * random.normal(size=v.shape), v.dtype), trainable)
    adapted = sj.combine(moved, frozen)
    wide = jax.tree.map(lambda v: v.astype(jnp.float32), sj.merge(adapted))
    module = Llama(small_llama(num_layers=1))
    expected = jax.jit(module.apply)({"params": wide}, tokens)
    actual = jax.jit(sj.with_adapters(model))(adapted, tokens).astype(jnp.float32)
    merged = jax.jit(model)(sj.merge(adapted), tokens).astype(jnp.float32)
    actual, expected, merged = map(np.asarray, (actual, expected, merged))
    scale = np.abs(expected).max()
    # No further from float32 than twice what the formed weights in bfloat16 are.
    assert np.abs(actual - expected).max() <= 2 * np.abs(merged - expected).max() + 1e-3 * scale
