"""Checkpoints of sharded trees, on 8 host devices of a process of their own."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import subspace_jax as sj
from subspace_jax.io import CheckpointError, abstract_checkpoint, restore_checkpoint, save_checkpoint

from ...eight_devices import eight_devices

OPTIMIZER = optax.adam(1e-3)


def place(mesh, specs):
    return jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda v: isinstance(v, P))


def save(folder):
    params = {"w": jax.random.normal(jax.random.key(0), (16, 8)), "b": jnp.zeros(8)}
    adapted = sj.adapt(params, {"w": sj.lora(rank=2)}, key=jax.random.key(1))
    specs = {"w": adapted["w"].partition_specs(P("x", None)), "b": P()}
    adapted = jax.device_put(adapted, place(jax.make_mesh((8,), ("x",)), specs))
    assert len(adapted["w"].base.addressable_shards) == 8
    assert adapted["w"].base.addressable_shards[0].data.shape == (2, 8)
    state = OPTIMIZER.init(sj.partition(adapted)[0])
    weak = {"scale": jnp.asarray(0.5), "keys": jax.random.split(jax.random.key(0), 8)}
    save_checkpoint(folder / "run", 1, adapted, opt_state=state)
    save_checkpoint(folder / "weak", 1, weak)
    return adapted, state, weak


def check_mesh(folder, mesh, adapted, state, weak):
    abstract = abstract_checkpoint(folder / "run").adapted
    places = place(mesh, {"w": abstract["w"].partition_specs(P("b", "a")), "b": P()})
    split = NamedSharding(mesh, P("b", None))

    def template(x):
        sharding = split if x.shape[:1] == (16,) else None
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    like = jax.tree.map(template, jax.eval_shape(OPTIMIZER.init, sj.partition(abstract)[0]))
    back = restore_checkpoint(folder / "run", like=like, shardings=places)
    assert jax.tree.map(lambda x: x.sharding, back.adapted) == places
    assert back.adapted["w"].base.addressable_shards[0].data.shape == (4, 4)
    assert back.opt_state[0].mu["w"].a.sharding == split
    restored, saved = jax.tree.leaves((back.adapted, back.opt_state)), jax.tree.leaves((adapted, state))
    for one, two in zip(restored, saved, strict=True):
        assert one.dtype == two.dtype
        assert np.asarray(one).tobytes() == np.asarray(two).tobytes()

    everywhere = NamedSharding(mesh, P())
    whole = restore_checkpoint(folder / "run", shardings=everywhere)
    assert all(x.sharding == everywhere for x in jax.tree.leaves(whole.adapted))

    keys = NamedSharding(mesh, P("a"))
    placed = restore_checkpoint(folder / "weak", shardings={"scale": everywhere, "keys": keys}).adapted
    assert placed["scale"].weak_type
    assert placed["scale"].sharding == everywhere
    assert placed["keys"].sharding.is_equivalent_to(keys, 1)
    assert (jax.random.key_data(placed["keys"]) == jax.random.key_data(weak["keys"])).all()


def check_refused(folder, mesh):
    for bad, words in (
        ({"w": NamedSharding(mesh, P("a"))}, "'w' is no array of the checkpoint"),
        ({"b": "a"}, "'b' has a str, expected a jax.sharding.Sharding"),
        ({"b": NamedSharding(mesh, P(None, "a"))}, "'b' of shape (8,) cannot be laid out so"),
    ):
        try:
            restore_checkpoint(folder / "run", shardings=bad)
        except CheckpointError as error:
            if words not in str(error):
                raise
        else:
            raise AssertionError(words)


def main(folder):
    assert len(jax.devices()) == 8
    saved = save(folder)
    for kind in (AxisType.Explicit, AxisType.Auto):
        mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(kind, kind))
        check_mesh(folder, mesh, *saved)
        check_refused(folder, mesh)


def test_restores_onto_other_meshes(tmp_path):
    environment = os.environ | eight_devices()
    command = [sys.executable, "-m", __name__, str(tmp_path)]
    root = pathlib.Path(__file__).parents[3]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr[-3000:]


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
