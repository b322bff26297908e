"""Fused attention: where it is taken, with what, and that the models compute the same with it.

No GPU is needed: the backend's name is replaced, and the call to cuDNN is answered by XLA after its arguments were
looked at. What cuDNN itself computes is not tested here.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import subspace_jax as sj
from subspace_jax.models import (
    Bert,
    Clip,
    Llama,
    Vit,
    init_cache,
    small_bert,
    small_clip,
    small_llama,
    small_vit,
)
from tests.models.model_helpers import random_params

KEY = jax.random.key(0)
TOKENS = jnp.asarray(np.random.default_rng(1).integers(1, 60, (2, 6)))
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(2, 12, 12, 3)), jnp.float32)
PADDED = jnp.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])


@pytest.fixture
def asked(monkeypatch):
    """What cuDNN was asked for, on what seems to be a GPU."""
    found, plain = [], jax.nn.dot_product_attention

    def answered(query, key, value, mask=None, implementation=None, **options):
        if implementation == "cudnn":
            found.append({"mask": mask, "dtype": query.dtype, **options})
            assert mask is None or mask.shape[2:] == (query.shape[1], key.shape[1])
        return plain(query, key, value, mask=mask, **options)

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", answered)
    return found


def both(make, config, *arguments, **options):
    """Outputs of one model with XLA's and with cuDNN's attention, on the same parameters."""
    model = make(config)
    params = random_params(model, *arguments[:1] if make is not Clip else arguments)
    fused = make(dataclasses.replace(config, attention="cudnn"))
    return [jax.jit(m.apply)({"params": params}, *arguments, **options) for m in (model, fused)]


HALF = {"dtype": jnp.bfloat16}
CASES = {
    "llama, causal": (Llama, small_llama(**HALF), (TOKENS,), {}, True),
    "llama, scanned": (Llama, small_llama(scan_layers=True, remat=True, **HALF), (TOKENS,), {}, True),
    "llama, padded": (Llama, small_llama(**HALF), (TOKENS, PADDED), {}, False),
    "llama, packed": (Llama, small_llama(**HALF), (TOKENS,), {"segments": PADDED}, False),
    "llama, window": (Llama, small_llama(window=3, **HALF), (TOKENS,), {}, False),
    "bert, padded": (Bert, small_bert(**HALF), (TOKENS, PADDED), {}, False),
    "vit": (Vit, small_vit(**HALF), (IMAGES,), {}, False),
    "clip": (Clip, small_clip(**HALF), (TOKENS, IMAGES), {}, False),
}


@pytest.mark.parametrize("name", CASES)
def test_models_compute_the_same_and_only_a_causal_mask_is_left_to_the_kernel(name, asked):
    make, config, arguments, options, causal = CASES[name]
    plain, fused = both(make, config, *arguments, **options)
    assert asked
    assert all(one["is_causal"] == causal and (one["mask"] is None or not causal) for one in asked)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(fused), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), atol=0.04, rtol=0.02)


def test_a_cache_keeps_its_mask(asked):
    config = small_llama(**HALF)
    params = random_params(Llama(config), TOKENS)
    plain, fused = (
        Llama(dataclasses.replace(config, attention=name)).apply(
            {"params": params}, TOKENS, None, init_cache(config, 2, 9)
        )
        for name in ("xla", "cudnn")
    )
    assert asked
    assert all(not one["is_causal"] for one in asked)
    np.testing.assert_allclose(plain[0], fused[0], atol=0.04, rtol=0.02)


def test_adapters_run_and_learn_with_it(asked):
    config = small_llama(attention="cudnn", **HALF)
    model = Llama(config)
    params = random_params(model, TOKENS)
    fn = lambda p: model.apply({"params": p}, TOKENS).mean()
    adapted = sj.adapt(params, {"decoder/**/kernel": sj.lora(2)}, key=KEY, roles=sj.roles(fn, params))
    trainable, frozen = sj.partition(adapted)
    gradient = jax.jit(jax.grad(lambda t: sj.with_adapters(fn)(sj.combine(t, frozen))))(trainable)
    assert asked
    assert any(np.any(np.asarray(v, np.float32)) for v in jax.tree.leaves(gradient))


def test_elsewhere_xla_computes(asked, monkeypatch):
    trace = lambda *case: jax.eval_shape(lambda: both(*case))
    trace(Llama, small_llama(), TOKENS)  # float32
    trace(Llama, small_llama(head_size=12, **HALF), TOKENS)  # no multiple of 8
    assert not asked
    trace(Llama, small_llama(**HALF), TOKENS)
    assert len(asked) == 2  # both layers
    asked.clear()
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    trace(Llama, small_llama(**HALF), TOKENS)
    trace(Bert, small_bert(**HALF), TOKENS, PADDED)
    assert not asked


def test_dropout_on_probabilities_stays_with_flax(asked):
    model = Bert(small_bert(attention="cudnn", dropout=0.5, **HALF))
    params = random_params(model, TOKENS, PADDED)
    asked.clear()
    run = lambda: model.apply({"params": params}, TOKENS, PADDED, deterministic=False, rngs={"dropout": KEY})
    jax.eval_shape(run)
    assert not asked


@pytest.mark.parametrize("small", [small_llama, small_bert, small_vit, small_clip])
def test_an_unknown_attention_is_refused(small):
    with pytest.raises(ValueError, match=r"attention='flash'; expected one of 'xla', 'cudnn'"):
        small(attention="flash")
