"""Functions of adapted trees through `jax.export`."""

import dataclasses

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

import subspace_jax as sj


def test_exported_functions_take_adapted_trees_of_every_kind(adapted, params):
    def fn(p):
        return [
            jnp.sum(leaf * 1.0) if leaf.ndim < 2 else leaf @ jnp.ones(leaf.shape[-1]) for leaf in jax.tree.leaves(p)
        ]

    run = jax.jit(sj.with_adapters(fn, on_materialize="allow"))
    data = jax.export.export(run)(adapted).serialize()
    again = jax.export.deserialize(bytearray(data))
    for one, other in zip(again.call(adapted), run(adapted), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_structure_comes_back_whole_with_its_remarks():
    tree = sj.adapt({"w": jnp.ones((6, 4))}, {"w": sj.dora(sj.lora(2, dropout=0.5))}, key=jax.random.key(0))
    data = jax.export.export(jax.jit(lambda t: t))(tree).serialize()
    out = jax.export.deserialize(bytearray(data)).call(tree)
    assert jax.tree.structure(out) == jax.tree.structure(tree)
    assert (out["w"].method, out["w"].direction.dropout) == ("dora(lora)", 0.5)
    other = {"w": dataclasses.replace(tree["w"], detach_norm=False)}
    try:
        jax.export.deserialize(bytearray(data)).call(other)
    except ValueError:
        return
    raise AssertionError("another structure was taken")


def test_the_library_registers_once():
    sj.io.register_library_for_export()
