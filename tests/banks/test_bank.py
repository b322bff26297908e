"""A bank of adapters: every row is what its own adapter gives alone, and the base is never copied."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import subspace_jax as sj
from subspace_jax.core import MaterializeError, NotMergeableError, RankError, StructureError
from subspace_jax.models import Llama, greedy_decode, small_llama
from tests.contract.kernels import KERNELS, make_inputs, make_params
from tests.models.model_helpers import random_params
from tests.tolerances import assert_rounding

KEY = jax.random.key(0)
MATRICES = tuple(KERNELS)


def model(params, inputs):
    return {name: KERNELS[name].use(params[name], inputs[name]) for name in inputs}


run_rows, run_alone = jax.jit(sj.per_row(model)), jax.jit(model)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def filled(adapted, seed):
    """The adapter with random factors, so that it changes something."""
    rng = np.random.default_rng(seed)
    trainable, frozen = sj.partition(adapted)
    random = jax.tree.map(
        lambda v: jnp.asarray(0.3 * rng.normal(size=v.shape) + (v if v.ndim == 1 else 0), v.dtype), trainable
    )
    return sj.combine(random, frozen)


def adapters(params, roles, names=MATRICES):
    rules = (
        {name: sj.lora(1) for name in names},
        {name: sj.dora(sj.lora(2, alpha=5.0)) for name in names if name != "tied"},
        {name: sj.lora(3, alpha=9.0, rank_stabilized=True) for name in names[::2]},
    )
    return [filled(sj.adapt(params, rule, key=KEY, roles=roles), i) for i, rule in enumerate(rules)]


@pytest.fixture(scope="module")
def case():
    params, inputs = make_params(), make_inputs()
    roles = sj.roles(model, params, inputs)
    made = adapters(params, roles)
    return params, inputs, roles, made, sj.bank(params, made)


def test_each_row_is_its_own_adapter_alone_on_every_kernel(case):
    params, inputs, _, made, bank = case
    rows = jnp.array([2, 0, 3, 1])
    found = run_rows(bank, rows, inputs)
    for i, row in enumerate(np.asarray(rows)):
        merged = params if row == 0 else sj.merge(made[row - 1], keep_float32=True)
        alone = run_alone(merged, jax.tree.map(lambda v, i=i: np.asarray(v)[i : i + 1], inputs))
        for name in KERNELS:
            size = 64 if KERNELS[name].dtype == jnp.bfloat16 else 512
            dtype = "bfloat16" if KERNELS[name].dtype == jnp.bfloat16 else "float32"
            assert_rounding(np.asarray(found[name])[i : i + 1], alone[name], size=size, dtype=dtype)


def test_rows_of_the_base_are_the_base_bit_for_bit(case):
    """In one program: whatever the other rows use, and with a bank of nothing. Another program may sum otherwise."""
    params, inputs, _, _, bank = case
    run = jax.jit(lambda bank, params, rows, inputs: (sj.per_row(model)(bank, rows, inputs), model(params, inputs)))
    nothing = bank
    for slot in (1, 2, 3):
        nothing = sj.banks.remove(nothing, slot)
    found, plain = run(bank, params, jnp.array([1, 0, 0, 2]), inputs)
    alone, _ = run(bank, params, jnp.zeros(4, jnp.int32), inputs)
    empty, _ = run(nothing, params, jnp.array([1, 0, 3, 2]), inputs)
    assert run._cache_size() == 1
    for name in inputs:
        np.testing.assert_array_equal(found[name][1:3], alone[name][1:3], err_msg=name)
        np.testing.assert_array_equal(empty[name], alone[name], err_msg=name)
        dtype = "bfloat16" if KERNELS[name].dtype == jnp.bfloat16 else "float32"
        assert_rounding(alone[name], plain[name], size=1 if dtype == "bfloat16" else 8, dtype=dtype)


def test_nothing_compiles_again_when_rows_slots_alphas_ranks_or_origins_change(case):
    params, inputs, roles, made, _ = case
    run = jax.jit(sj.per_row(model))
    bank = sj.bank(params, made, slots=6, rank=4)
    run(bank, jnp.array([1, 0, 0, 2]), inputs)
    other = filled(sj.adapt(params, {n: sj.lora(2, alpha=7.0) for n in MATRICES}, key=KEY, roles=roles), 9)
    changed = sj.banks.put(sj.banks.remove(bank, 1), 5, other)
    found = run(changed, jnp.array([5, 1, 3, 5]), inputs)
    assert run._cache_size() == 1
    alone = run_alone(sj.merge(other), jax.tree.map(lambda v: np.asarray(v)[:1], inputs))
    assert_rounding(found["square"][:1], alone["square"], size=64)
    x = np.asarray(inputs["square"])
    assert_rounding(found["square"][1:2], x[1:2] @ np.asarray(params["square"]), size=64)
    assert_rounding(found["square"][2:3], x[2:3] @ np.asarray(sj.merge(made[2])["square"]), size=64)


def test_padded_adapters_of_other_ranks_alphas_and_origins_are_one_program():
    params = {"w": normal(0, 6, 5)}
    run = jax.jit(lambda p, x: sj.with_adapters(lambda p, x: x @ p["w"])(p, x))
    x = normal(1, 3, 6)
    for method in (sj.lora(4), sj.lora(2, alpha=9.0), sj.lora(1, rank_stabilized=True), sj.pissa(2)):
        adapted = filled(sj.adapt(params, {"w": method}, key=KEY), 1)
        adapted = sj.to_lora(adapted, params)
        padded = sj.banks.pad_rank(adapted, 4)
        assert_rounding(run(padded, x), x @ sj.merge(adapted)["w"], size=32)
        assert_rounding(sj.merge(padded)["w"], sj.merge(adapted)["w"], size=8)
    assert run._cache_size() == 1
    with pytest.raises(RankError, match=r"^w: has rank 4, above 2"):
        sj.banks.pad_rank(sj.adapt(params, {"w": sj.lora(4)}, key=KEY), 2)
    core = filled(sj.adapt(params, {"w": sj.methods.lora_sb.lora_xs(2)}, key=KEY), 1)
    assert_rounding(sj.merge(sj.banks.pad_rank(core, 3))["w"], sj.merge(core)["w"], size=8)


def test_a_training_step_of_a_bank_is_a_step_of_every_adapter_on_its_rows():
    params = {"w": normal(0, 6, 5), "v": normal(2, 5, 4)}
    rules = ({"w": sj.lora(2)}, {"*": sj.dora(sj.lora(3, alpha=2.0))}, {"v": sj.dora(sj.lora(1))}, {"w": sj.lora(1)})
    made = [filled(sj.adapt(params, rule, key=KEY), i) for i, rule in enumerate(rules)]
    x, y = np.asarray(normal(3, 7, 6)), np.asarray(normal(4, 7, 4))
    rows = jnp.array([1, 2, 0, 3, 2, 1, 3])

    def fn(p, x):
        return jnp.tanh(x @ p["w"]) @ p["v"]

    trainable, frozen = sj.partition(sj.bank(params, made, trainable=True))
    loss = lambda t: jnp.sum((sj.per_row(fn)(sj.combine(t, frozen), rows, x) - y) ** 2)
    found = jax.jit(jax.grad(loss))(trainable)
    for i, adapted in enumerate(made):
        mine = np.flatnonzero(np.asarray(rows) == i + 1)
        learned, fixed = sj.partition(adapted)

        def loss_alone(t, fixed=fixed, mine=mine):
            return jnp.sum((sj.with_adapters(fn)(sj.combine(t, fixed), x[mine]) - y[mine]) ** 2)

        alone = jax.jit(jax.grad(loss_alone))(learned)
        for name in rules[i] if "*" not in rules[i] else params:
            inner = alone[name].direction if isinstance(alone[name], sj.methods.dora.Magnitude) else alone[name]
            rank = inner.a.shape[-1]
            assert_rounding(found[name].a[i + 1, :, :rank], inner.a, size=256)
            assert_rounding(found[name].b[i + 1, :rank], inner.b, size=256)
            assert not np.asarray(found[name].a[i + 1, :, rank:]).any()
            if inner is not alone[name]:
                assert_rounding(found[name].magnitude[i + 1], alone[name].magnitude, size=256)
    # Slot 0, and slots of no row of this batch (here the last): gradients of exactly zero.
    for slot in (0, 4):
        assert not any(np.asarray(v[slot]).any() for n in params for v in (found[n].a, found[n].b))
    taken = sj.banks.take(sj.combine(trainable, frozen), 2)
    assert_rounding(sj.merge(taken)["v"], sj.merge(made[1])["v"], size=16)


def test_a_column_of_zeros_gives_finite_gradients_through_its_norm():
    params = {"w": normal(0, 6, 5) * (np.arange(5) != 2)}
    made = sj.adapt(params, {"w": sj.dora(sj.lora(2), norm="exact")}, key=KEY)
    trainable, frozen = sj.partition(sj.bank(params, [made], trainable=True))
    x, rows = normal(1, 4, 6), jnp.array([0, 1, 1, 0])
    run = sj.per_row(lambda p, x: x @ p["w"])
    found = jax.jit(jax.grad(lambda t: jnp.sum(run(sj.combine(t, frozen), rows, x) ** 2)))(trainable)
    assert all(np.isfinite(v).all() for v in jax.tree.leaves(found))


def _mlp(p, x):
    for i in range(4):
        x = jnp.tanh(x @ p[f"w{i}"])
    return x


@pytest.mark.parametrize("backward", [False, True])
def test_operations_and_bytes_are_those_of_one_lora(backward):
    """At the bank's rank, unrolled: at most 1.05 of one LoRA, and no more memory than the gathered factors take."""
    width, rank, batch, length = 128, 4, 8, 16
    params = {f"w{i}": normal(i, width, width) for i in range(4)}
    one = sj.adapt(params, {"*": sj.lora(rank)}, key=KEY)
    bank = sj.bank(params, [one] * 8, trainable=True)
    x, rows = jnp.ones((batch, length, width)), jnp.arange(batch)

    def cost(tree, run, *args):
        trainable, frozen = sj.partition(tree)

        def loss(t, f, *args):
            return jnp.sum(run(sj.combine(t, f), *args) ** 2)

        program = jax.jit(jax.grad(loss) if backward else loss).lower(trainable, frozen, *args).compile()
        memory = program.memory_analysis()
        return program.cost_analysis()["flops"], memory.temp_size_in_bytes

    flops, bytes_of_one = cost(one, sj.with_adapters(_mlp), x)
    bank_flops, bank_bytes = cost(bank, sj.per_row(_mlp), rows, x)
    assert bank_flops <= 1.05 * flops
    gathered = 4 * 3 * batch * rank * (width + width) * 4
    assert bank_bytes <= bytes_of_one + gathered


def test_generation_with_a_cache_gives_each_row_its_own_adapters_tokens():
    module = Llama(small_llama())
    prompt = np.random.default_rng(5).integers(0, 64, (4, 6))
    params = random_params(module, prompt)
    roles = sj.roles(lambda p, t: module.apply({"params": p}, t), params, prompt)
    rules = {"**/kernel": sj.lora(3), "**/embedding": sj.lora(2)}
    made = [filled(sj.adapt(params, rules, key=KEY, roles=roles), i) for i in range(2)]
    bank, rows = sj.bank(params, made), jnp.array([1, 0, 2, 1])
    found = greedy_decode(module, bank, prompt, 5, rows=rows)
    trees = [params, *map(sj.merge, made)]
    for i, row in enumerate(np.asarray(rows)):
        np.testing.assert_array_equal(found[i], greedy_decode(module, trees[row], prompt[i : i + 1], 5)[0])
    assert len({tuple(np.asarray(greedy_decode(module, t, prompt[:1], 5)[0])) for t in trees}) > 1


def test_methods_on_a_residual_enter_on_the_original_at_twice_the_rank(case):
    params = {"w": normal(0, 8, 6)}
    made = [
        filled(sj.adapt(params, {"w": m}, key=KEY), 3)
        for m in (sj.pissa(2, svd="exact"), sj.methods.lora_sb.lora_xs(2))
    ]
    bank = sj.bank(params, made)
    assert bank["w"].rank == 4
    np.testing.assert_array_equal(bank["w"].base, params["w"])
    x = normal(1, 3, 8)
    found = sj.per_row(lambda p, x: x @ p["w"])(bank, jnp.array([1, 2, 0]), x)
    for i, tree in enumerate((*map(sj.merge, made), params)):
        assert_rounding(found[i], np.asarray(x)[i] @ np.asarray(tree["w"]), size=128)


def test_files_and_checkpoints_keep_a_bank(tmp_path, case):
    params, inputs, _, _, bank = case
    rows = jnp.array([1, 2, 3, 0])
    path = sj.save_adapter(tmp_path / "bank.safetensors", bank, base=params)
    loaded = sj.load_adapter(path, params)
    kept, programs = run_rows(bank, rows, inputs), run_rows._cache_size()
    jax.tree.map(np.testing.assert_array_equal, kept, run_rows(loaded, rows, inputs))
    assert run_rows._cache_size() == programs


def test_bad_input_is_refused(case):
    params = {"w": jnp.ones((4, 3)), "b": jnp.zeros(3)}
    adapted = sj.adapt(params, {"w": sj.lora(2)}, key=KEY)
    bank = sj.bank(params, [adapted])
    run = sj.per_row(lambda p, x: x @ p["w"])
    x = jnp.ones((2, 4))
    for rows, message in (
        (jnp.array([0, 2]), "name slots 0 to 2, and the bank has 0 to 1"),
        (jnp.array([0, 1, 1]), r"3 rows are named, and an argument of shape \(2, 4\)"),
        (jnp.array([0.0, 1.0]), "expected one integer for each row"),
    ):
        with pytest.raises(ValueError, match=message):
            run(bank, rows, x)
    with pytest.raises(StructureError, match="holds no bank"):
        run(params, jnp.array([0, 1]), x)
    with pytest.raises(MaterializeError, match=r"sj\.per_row"):
        sj.with_adapters(lambda p, x: x @ p["w"])(bank, x)
    with pytest.raises(NotMergeableError, match=r"^w: "):
        sj.merge(bank)
    other = sj.adapt({"w": 2 * params["w"], "b": params["b"]}, {"w": sj.lora(2)}, key=KEY)
    with pytest.raises(StructureError, match=r"^w: adapter 0 stands on other numbers"):
        sj.bank(params, [other])
    with pytest.raises(StructureError, match=r"^b: adapter 0 has a Full"):
        sj.bank(params, [sj.adapt(params, {"b": sj.full()}, key=KEY)])
    with pytest.raises(StructureError, match=r"^w: adapter 0 has a Rotated.*merge\(\)"):
        sj.bank(params, [sj.adapt(params, {"w": sj.oft(2)}, key=KEY)])
    with pytest.raises(RankError, match="rank 3, and the bank was made for rank 2"):
        sj.banks.put(bank, 1, sj.adapt(params, {"w": sj.lora(3)}, key=KEY))
    with pytest.raises(StructureError, match="no room for gains"):
        sj.banks.put(bank, 1, sj.adapt(params, {"w": sj.dora(sj.lora(2))}, key=KEY))
    with pytest.raises(ValueError, match="slot 2: the bank has slots 1 to 1"):
        sj.banks.put(bank, 2, adapted)
    with pytest.raises(ValueError, match="need 2 slots; slots=1"):
        sj.bank(params, [adapted], slots=1)
    pissa = sj.adapt(params, {"w": sj.pissa(1)}, key=KEY)
    with pytest.raises(StructureError, match="cannot go on learning"):
        sj.bank(params, [pissa], trainable=True)
    wrong = dataclasses.replace(pissa["w"], base=pissa["w"].base + 1.0)
    with pytest.raises(StructureError, match="differs from the shared base by 1"):
        sj.bank(params, [{**pissa, "w": wrong}])


@pytest.mark.optimized
def test_a_table_in_a_bank_is_read_where_it_is_and_not_copied_for_each_row():
    words, rank, rows = 4000, 4, jnp.array([1, 0, 2, 1, 2, 0, 1, 2])
    params = {"table": normal(0, words, 6)}
    roles = {"table": sj.Role.embedding()}
    made = [filled(sj.adapt(params, {"table": sj.lora(rank)}, key=KEY, roles=roles), i) for i in range(2)]
    bank = sj.bank(params, made)
    index = np.random.default_rng(0).integers(-2, words + 2, (8, 3)).astype(np.int32)
    for mode in ("clip", "fill"):
        fn = lambda p, i, mode=mode: jnp.take(p["table"], i, axis=0, mode=mode)
        run = jax.jit(sj.per_row(fn))
        found = run(bank, rows, index)
        for i, row in enumerate(rows):
            alone = fn(params if row == 0 else sj.merge(made[row - 1]), index[i : i + 1])
            assert_rounding(jnp.nan_to_num(found[i : i + 1]), jnp.nan_to_num(alone), size=32)
            np.testing.assert_array_equal(jnp.isnan(found[i : i + 1]), jnp.isnan(alone))
        memory = run.lower(bank, rows, index).compile().memory_analysis()
        assert memory.temp_size_in_bytes < words * rank * 4  # less than one table of one adapter


def test_a_lookup_along_the_outputs_of_a_kernel_is_each_adapters_own():
    params, index = {"w": normal(0, 6, 5)}, jnp.array([[0, 4], [2, 2], [1, 3]])
    made = [filled(sj.adapt(params, {"w": sj.lora(2)}, key=KEY), i) for i in range(2)]
    fn = lambda p, i: jnp.take(p["w"], i, axis=1)
    found = sj.per_row(fn, out_axes=1)(sj.bank(params, made), jnp.array([2, 0, 1]), index)
    for i, row in enumerate((2, 0, 1)):
        alone = fn(params if row == 0 else sj.merge(made[row - 1]), index[i : i + 1])
        assert_rounding(found[:, i : i + 1], alone, size=32)
