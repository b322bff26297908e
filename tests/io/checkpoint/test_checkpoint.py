import json
import os
import shutil
import subprocess
import sys
import textwrap
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import subspace_jax as sj
from subspace_jax.io import (
    Checkpointer,
    CheckpointError,
    abstract_checkpoint,
    latest_step,
    restore_checkpoint,
    save_checkpoint,
)

OPTIMIZERS = {
    "adam": lambda: optax.adam(1e-3),
    "chain": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(1e-2, 10)), optax.ema(0.9)
    ),
    "inject": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=optax.linear_schedule(0.1, 0.0, 5)),
    "multisteps": lambda: optax.MultiSteps(optax.adam(1e-3), every_k_schedule=3),
    "stateless": lambda: optax.sgd(1e-3),
    "partition": lambda: optax.multi_transform(
        {"x": optax.adam(1e-3), "y": optax.sgd(0.1, momentum=0.9)}, lambda t: jax.tree.map(lambda _: "x", t)
    ),
}


def stepped(optimizer, adapted, count=2):
    """Parameters and state after some updates, so that no part of the state is where it started."""
    trainable, frozen = sj.partition(adapted)
    state = optimizer.init(trainable)
    for i in range(count):
        gradients = jax.tree.map(lambda x, i=i: jnp.cos(x + i), trainable)
        updates, state = optimizer.update(gradients, state, trainable)
        trainable = optax.apply_updates(trainable, updates)
    return sj.combine(trainable, frozen), state


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_round_trip_with_optimizer(folder, adapted, assert_same_bits, name):
    optimizer = OPTIMIZERS[name]()
    tree, state = stepped(optimizer, adapted)
    extra = {"key": jax.random.key(5), "epoch": 3, "order": np.arange(4), "rng": {"pcg": [1, 2**127]}}
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        save_checkpoint(folder, 2, tree, opt_state=state, extra=extra)
    # inject_hyperparams turns bfloat16 moments into float32 at the first update, so init() would not do here.
    like = jax.tree.map(jnp.zeros_like, state)
    for template in (like, jax.eval_shape(lambda: like)):
        back = restore_checkpoint(folder, like=template)
        assert back.step == 2
        assert_same_bits(back.adapted, tree)
        assert_same_bits(back.opt_state, state)
        assert_same_bits(back.extra, extra)
    assert restore_checkpoint(folder).opt_state is None


def test_nested_and_quantized_weights(folder, assert_same_bits):
    params = {"w": jax.random.normal(jax.random.key(0), (16, 8)), "v": jnp.ones((8, 8))}
    tree = sj.adapt(params, {"w": sj.dora(sj.pissa(rank=2)), "v": sj.qpissa(rank=2)}, key=jax.random.key(1))
    save_checkpoint(folder, 0, tree)
    assert_same_bits(restore_checkpoint(folder).adapted, tree)


def test_all_kinds_of_arrays(folder, assert_same_bits):
    names = ["int2", "int4", "uint4", "float8_e4m3fn", "float8_e5m2", "float4_e2m1fn", "bool", "complex64", "uint16"]
    tree = {name: jnp.asarray([0, 1, 1, 0]).astype(jnp.dtype(name)) for name in names}
    tree |= {"empty": jnp.zeros((0, 3)), "scalar": np.float64(0.1), "wide": np.arange(3, dtype=np.int64)}
    tree |= {
        "weak": jnp.asarray(0.1),
        "weak count": jnp.asarray(3),
        "a.b/c d": jnp.ones(2),
        "nan": jnp.asarray([jnp.nan, -0.0]),
    }
    save_checkpoint(folder, 0, tree)
    assert_same_bits(restore_checkpoint(folder).adapted, tree)
    save_checkpoint(folder, 1, {"only": jnp.zeros((2, 0))}, extra="no arrays at all")
    back = restore_checkpoint(folder)
    assert back.adapted["only"].shape == (2, 0)
    assert back.extra == "no arrays at all"
    save_checkpoint(folder, 2, jnp.arange(3.0))
    assert_same_bits(restore_checkpoint(folder).adapted, jnp.arange(3.0))


def test_weak_dtype_decides_promotion(folder):
    # A bfloat16 array times a weak float32 scalar is bfloat16; a strong one would change every later step.
    save_checkpoint(folder, 0, {}, extra=jnp.asarray(0.1))
    assert (jnp.ones(2, jnp.bfloat16) * restore_checkpoint(folder).extra).dtype == jnp.bfloat16


def test_wide_arrays_need_x64(folder, assert_same_bits):
    with jax.enable_x64(True):
        tree = {"w": jnp.asarray([0.1], jnp.float64)}
        save_checkpoint(folder, 0, tree)
        assert_same_bits(restore_checkpoint(folder).adapted, tree)
    with pytest.raises(CheckpointError, match="adapted/w: was saved as float64"):
        restore_checkpoint(folder)


def test_steps(folder, adapted):
    assert latest_step(folder) is None
    assert not folder.exists()
    with Checkpointer(folder, max_to_keep=2) as checkpointer:
        for step in (1, 3, 10):
            checkpointer.save(step, adapted, extra=step)
        assert checkpointer.all_steps() == [3, 10]
        assert checkpointer.latest_step() == 10
        assert checkpointer.restore(3).extra == 3
        for step in (10, 2, 0):
            with pytest.raises(CheckpointError, match=f"step {step} is not above the latest saved step 10"):
                checkpointer.save(step, adapted)
    assert latest_step(str(folder)) == 10
    assert restore_checkpoint(folder, 3).step == 3
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 4; it holds steps \[3, 10\]"):
        restore_checkpoint(folder, 4)
    for step in (-1, 1.5, "1", True):
        with pytest.raises(CheckpointError, match="expected a non-negative integer"):
            save_checkpoint(folder, step, adapted)


def test_background(folder, adapted, assert_same_bits):
    with Checkpointer(folder, background=True) as checkpointer:
        step = jax.jit(lambda t: jax.tree.map(lambda x: x * 2, t), donate_argnums=0)
        value = {"w": jnp.arange(100_000.0)}
        for i in range(3):
            checkpointer.save(i, value, extra=i)
            value = step(value)
        checkpointer.wait()
        for i in range(3):
            assert_same_bits(checkpointer.restore(i).adapted, {"w": jnp.arange(100_000.0) * 2**i})


def test_base_is_left_out(folder, params, adapted, assert_same_bits):
    save_checkpoint(folder / "whole", 0, adapted)
    save_checkpoint(folder / "light", 0, adapted, base=params)
    with Checkpointer(folder / "light", base=params) as checkpointer:
        assert not any("base" in name or "norm" in name for name in checkpointer._stored(0))
    back = restore_checkpoint(folder / "light", base=params)
    assert_same_bits(back.adapted, adapted)
    assert back.adapted["stacked"]["kernel"].base is params["stacked"]["kernel"]
    with pytest.raises(CheckpointError, match="'stacked/kernel' is missing from the base tree"):
        restore_checkpoint(folder / "light")
    other = {**params, "stacked": {"kernel": params["stacked"]["kernel"] * 2}}
    with pytest.raises(CheckpointError, match="'stacked/kernel' has other numbers in the base tree"):
        restore_checkpoint(folder / "light", base=other)


@pytest.mark.parametrize(
    ("like", "words"),
    [
        (lambda t: optax.sgd(0.1, momentum=0.9).init(t), "'0/trace/.*' is missing, expected"),
        (lambda t: optax.sgd(0.1).init(t), r"'0/count' is not expected, holds int32\[\]"),
        (
            lambda t: jax.tree.map(lambda x: x.astype(jnp.float16), optax.adam(0.1).init(t)),
            r"'0/mu/stacked/kernel/a' holds float32\[3, 4, 2\], expected float16\[3, 4, 2\]",
        ),
        (
            lambda t: jax.tree.map(lambda x: x[None], optax.adam(0.1).init(t)),
            r"'0/count' holds int32\[\], expected int32\[1\]",
        ),
        (
            lambda t: jax.tree.map(lambda x: 1 if x.ndim == 0 else x, optax.adam(0.1).init(t)),
            "'0/count' holds .*expected int",
        ),
    ],
)
def test_optimizer_of_another_kind(folder, adapted, like, words):
    trainable = sj.partition(adapted)[0]
    save_checkpoint(folder, 0, adapted, opt_state=optax.adam(0.1).init(trainable))
    with pytest.raises(CheckpointError, match=words) as caught:
        restore_checkpoint(folder, like=like(trainable))
    assert str(folder) in str(caught.value)


def test_optimizer_of_other_adapters(folder, params, adapted):
    save_checkpoint(folder, 0, adapted, opt_state=optax.adam(0.1).init(sj.partition(adapted)[0]))
    other = sj.adapt(params, {"blocks/*/kernel": sj.lora(rank=3)}, key=jax.random.key(0))
    with pytest.raises(
        CheckpointError, match=r"'0/mu/blocks/0/kernel/a' holds bfloat16\[4, 2\], expected float32\[4, 3\]"
    ):
        restore_checkpoint(folder, like=optax.adam(0.1).init(sj.partition(other)[0]))


def test_optimizer_that_was_not_saved(folder, adapted):
    save_checkpoint(folder, 0, adapted)
    with pytest.raises(CheckpointError, match="saved without opt_state"):
        restore_checkpoint(folder, like=optax.sgd(0.1).init(adapted))


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"adapted": {"w": object()}}, r"w: a builtins.object cannot be saved"),
        ({"adapted": {"w": jax.ShapeDtypeStruct((2,), np.float32)}}, "adapted/w: is abstract"),
        ({"adapted": {}, "extra": {"f": print}}, "f: a builtins.builtin_function_or_method cannot be saved"),
        ({"adapted": {}, "opt_state": {"f": print}}, "f: a builtins.builtin_function_or_method cannot be saved"),
    ],
)
def test_refused_saves_write_nothing(folder, state, words):
    with pytest.raises(CheckpointError, match=words):
        save_checkpoint(folder, 0, **state)
    assert os.listdir(folder) == []


def rewrite(folder, change):
    """Writes the checkpoint again with Orbax alone, after changing manifest and arrays."""
    import orbax.checkpoint as ocp

    handlers = {"arrays": ocp.PyTreeCheckpointHandler(), "manifest": ocp.JsonCheckpointHandler()}
    with ocp.CheckpointManager(folder, item_handlers=handlers) as manager:
        items = manager.restore(
            0, args=ocp.args.Composite(arrays=ocp.args.PyTreeRestore(), manifest=ocp.args.JsonRestore())
        )
        manifest, arrays = items["manifest"], dict(items["arrays"])
        change(manifest, arrays)
        manager.delete(0)
        args = {"arrays": ocp.args.PyTreeSave(arrays), "manifest": ocp.args.JsonSave(manifest)}
        manager.save(0, args=ocp.args.Composite(**args), force=True)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m, a: a.pop("adapted/stacked/kernel/a"), "'adapted/stacked/kernel/a' is missing, expected float32"),
        (lambda m, a: a.update({"adapted/more": np.ones(3)}), r"'adapted/more' is not expected, holds float64\[3\]"),
        (
            lambda m, a: a.update({"adapted/embed/value": np.ones((4, 7), np.float32)}),
            r"holds float32\[4, 7\], expected float32\[7, 4\]",
        ),
        (lambda m, a: a.update({"adapted/embed/value": np.ones((7, 4), np.float16)}), "holds float16"),
        (lambda m, a: m.update(format_version=2), "format_version 2"),
        (lambda m, a: m.update(step="x"), "non-negative integer"),
        (lambda m, a: m.pop("extra"), "does not describe"),
        (lambda m, a: m.update(opt_state=[]), "leaves of opt_state"),
        (lambda m, a: m.update(adapted=7), "no node"),
    ],
)
def test_changed_checkpoints(folder, adapted, change, words):
    save_checkpoint(folder, 0, adapted)
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=words):
        restore_checkpoint(folder)


def test_foreign_checkpoint(folder):
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(folder) as manager:
        manager.save(0, args=ocp.args.StandardSave({"w": np.ones(2)}))
    with pytest.raises(CheckpointError, match="not written by this library"):
        restore_checkpoint(folder)
    with pytest.raises(CheckpointError, match="no such folder"):
        restore_checkpoint(folder / "none")
    (folder / "empty").mkdir()
    with pytest.raises(CheckpointError, match="there is no checkpoint; it holds steps none"):
        restore_checkpoint(folder / "empty")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_damaged_files(folder, adapted, assert_same_bits):
    save_checkpoint(folder, 0, adapted)
    good = {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    assert len(good) > 5
    for path, content in good.items():
        for damage in ("truncated", "gone"):
            if damage == "gone":
                path.unlink()
            else:
                path.write_bytes(content[: len(content) // 2])
            try:
                back = restore_checkpoint(folder)
            except CheckpointError:
                back = None
            # Orbax keeps some files that it does not need; what comes back must be right or refused.
            if back is not None:
                assert_same_bits(back.adapted, adapted)
            path.write_bytes(content)
    assert_same_bits(restore_checkpoint(folder).adapted, adapted)


def test_unfinished_checkpoint_is_not_seen(folder, adapted):
    """A kill before Orbax's rename leaves the earlier checkpoint as the latest."""
    script = """
        import os, pathlib, signal, sys
        import jax.numpy as jnp
        from subspace_jax.io import Checkpointer
        real = os.rename
        def kill(*args, **kwargs):
            os.kill(os.getpid(), signal.SIGKILL)
        with Checkpointer(sys.argv[1]) as checkpointer:
            checkpointer.save(1, {"w": jnp.ones(3)})
            os.rename = os.replace = pathlib.Path.rename = pathlib.Path.replace = kill
            checkpointer.save(2, {"w": jnp.zeros(3)})
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(folder)], check=False, capture_output=True
    )
    assert done.returncode == -9, done.stderr[-500:]
    assert latest_step(folder) == 1
    assert len(os.listdir(folder)) > 1, "the kill came before anything was written"
    np.testing.assert_array_equal(restore_checkpoint(folder).adapted["w"], np.ones(3))
    save_checkpoint(folder, 2, {"w": jnp.full(3, 2.0)})
    np.testing.assert_array_equal(restore_checkpoint(folder).adapted["w"], np.full(3, 2.0))
    assert sorted(os.listdir(folder)) == ["1", "2"]


def test_restoring_writes_nothing(folder, adapted):
    save_checkpoint(folder, 0, adapted)
    (folder / "5.orbax-checkpoint-tmp-1").mkdir()
    before = sorted((str(p), p.stat().st_mtime_ns) for p in folder.rglob("*"))
    restore_checkpoint(folder)
    abstract_checkpoint(folder)
    assert latest_step(folder) == 0
    assert sorted((str(p), p.stat().st_mtime_ns) for p in folder.rglob("*")) == before


def test_abstract(folder, adapted):
    save_checkpoint(folder, 4, adapted, extra={"key": jax.random.key(0)})
    abstract = abstract_checkpoint(folder)
    assert abstract.step == 4
    assert abstract.extra["key"].dtype == jax.random.key(0).dtype
    expected = jax.tree.map(lambda x: (x.shape, x.dtype), adapted)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract.adapted) == expected


def test_no_pickle(folder, adapted):
    """Every file of a checkpoint is JSON, text or an OCDBT database."""
    save_checkpoint(folder, 0, adapted, opt_state=optax.adam(0.1).init(sj.partition(adapted)[0]))
    for path in (p for p in folder.rglob("*") if p.is_file()):
        content = path.read_bytes()
        if path.parent.name == "d" or path.name.endswith(".ocdbt"):
            assert (
                content[:4] in (b"\x0c\xdb\x3a\x2a", b"\x0c\xdb\x20\xde", b"\x0c\xdb\x1d\x8d")
                or path.parent.name == "d"
            )
        elif path.name != "commit_success.txt":
            json.loads(content)


def test_moved_folder(folder, adapted, assert_same_bits):
    save_checkpoint(folder, 0, adapted)
    shutil.move(folder, folder.with_name("elsewhere"))
    assert_same_bits(restore_checkpoint(folder.with_name("elsewhere")).adapted, adapted)


def test_bases_that_a_seed_gives_are_not_in_the_checkpoint(folder, assert_same_bits):
    params = {name: jax.random.normal(jax.random.key(0), (24, 32)) for name in ("a", "b", "c")}
    adapted = sj.adapt(params, {"*": sj.randlora(4)}, key=jax.random.key(1))
    optimizer = optax.adam(1e-3)
    tree, state = stepped(optimizer, adapted)
    with Checkpointer(folder, base=params) as checkpointer:
        checkpointer.save(1, tree, opt_state=state)
        like = jax.eval_shape(optimizer.init, sj.partition(tree)[0])
        back = checkpointer.restore(like=like)
        assert_same_bits(back.adapted, tree)
        assert_same_bits(back.opt_state, state)
        assert_same_bits(checkpointer.restore().adapted, tree)
        assert not [path for path in checkpointer._stored(1) if "basis" in path or path.endswith("base")]
        abstract = checkpointer.abstract().adapted
        assert (abstract["a"].basis_b.shape, abstract["b"].basis_b) == ((6, 4, 32), None)
        assert isinstance(abstract["a"].basis_b, jax.ShapeDtypeStruct)
    assert_same_bits(sj.merge(back.adapted), sj.merge(tree))


def test_regenerated_arrays_go_where_shardings_say(folder):
    adapted = sj.adapt({"w": jnp.ones((24, 32))}, {"w": sj.randlora(4)}, key=jax.random.key(1))
    save_checkpoint(folder, 0, adapted)
    mesh = jax.make_mesh((1,), ("x",))
    specs = abstract_checkpoint(folder).adapted["w"].partition_specs(jax.sharding.PartitionSpec("x", None))
    places = jax.tree.map(lambda spec: jax.sharding.NamedSharding(mesh, spec), {"w": specs})
    back = restore_checkpoint(folder, shardings=places).adapted
    assert jax.tree.map(lambda v: v.sharding, back) == places
    assert places["w"].basis_a.spec == jax.sharding.PartitionSpec(None, "x")
    assert places["w"].feature_scales.spec == jax.sharding.PartitionSpec(None, "x")
    np.testing.assert_array_equal(back["w"].basis_b, adapted["w"].basis_b)


def test_a_state_of_old_paths_loads_into_variables_of_nnx(folder, adapted):
    """Once `.value` of a variable was a name in its path; a dict with that key writes the same file."""
    old = {"w": {"value": jnp.arange(6.0).reshape(2, 3)}}
    optimizer = optax.adam(1e-3)
    _, state = optimizer.update(old, optimizer.init(old))
    save_checkpoint(folder, 1, adapted, opt_state=state)
    like = optimizer.init(nnx.state(nnx.Dict(w=nnx.Param(jnp.zeros((2, 3))))))
    found = restore_checkpoint(folder, like=like).opt_state
    assert jax.tree.structure(found) == jax.tree.structure(like)
    np.testing.assert_array_equal(jax.tree.leaves(found[0].mu)[0], state[0].mu["w"]["value"])


def test_named_tuples_without_fields(folder, adapted, assert_same_bits):
    extra = {"other": (optax.EmptyState(), optax.sgd(1e-3, momentum=0.9).init(jnp.ones(3)))}
    save_checkpoint(folder, 1, adapted, extra=extra)
    restored = restore_checkpoint(folder)
    assert_same_bits(restored.extra, extra)
    assert type(restored.extra["other"][0]) is optax.EmptyState
