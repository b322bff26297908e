"""Banks of modules on activations: kinds and sizes beside each other, low rank too, at the cost of one module."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import subspace_jax as sj
from subspace_jax.core import MaterializeError, NotMergeableError, StructureError
from subspace_jax.models import Llama, Vit, greedy_decode, small_llama, small_vit
from tests.models.model_helpers import random_params
from tests.tolerances import assert_rounding

KEY = jax.random.key(0)
LAST = "**/{out,fc2}/{kernel,bias}"


def filled(adapted, seed):
    """The adapter with random values, so that it changes something."""
    rng = np.random.default_rng(seed)
    trainable, frozen = sj.partition(adapted)
    random = lambda v: jax.device_put((0.3 * rng.normal(size=v.shape)).astype(v.dtype))
    return sj.combine(jax.tree.map(random, trainable), frozen)


def parallel(size, **options):
    return sj.bottleneck(size, placement="parallel", reads="fc1", scale=0.1, **options)


@pytest.fixture(scope="module")
def case():
    module = Vit(small_vit())
    side = module.config.patch_size * module.config.position_grid
    images = jnp.asarray(np.random.default_rng(0).normal(size=(6, side, side, 3)), jnp.float32)
    params = random_params(module, images)
    fn = lambda p, x: jax.tree.leaves(module.apply({"params": p}, x))[0]
    roles = sj.roles(fn, params, images)
    rules = {
        "pfeiffer": {"**/fc2/{kernel,bias}": sj.bottleneck(4, activation="gelu")},
        "houlsby": {LAST: sj.bottleneck(2, activation="gelu")},
        "adaptformer": {"**/{fc1,fc2}/kernel": parallel(5)},
        "lora": {"**/{fc1,fc2}/kernel": sj.lora(2, alpha=3.0)},
        "dora": {"**/fc2/kernel": sj.dora(sj.lora(3))},
    }
    made = {n: filled(sj.adapt(params, rule, key=KEY, roles=roles), i) for i, (n, rule) in enumerate(rules.items())}
    return params, fn, images, made


def test_adaptformer_pfeiffer_houlsby_lora_and_dora_answer_in_one_batch(case):
    params, fn, images, made = case
    rows = jnp.array([3, 0, 2, 4, 5, 1])
    run = jax.jit(sj.per_row(fn))
    bank = sj.bank(params, list(made.values()), slots=7)
    found, base = run(bank, rows, images), run(bank, jnp.zeros(6, jnp.int32), images)
    np.testing.assert_array_equal(found[1], base[1])
    alone, trees = jax.jit(sj.with_adapters(fn)), [params, *made.values()]
    for i, row in enumerate(np.asarray(rows)):
        assert_rounding(found[i], alone(trees[row], images)[i], size=256)
    assert not np.allclose(found[2:], base[2:])
    # An adapter taken out is the one put in, with zeros behind its hidden features; what it leaves out adds nothing.
    for slot, name in ((1, "pfeiffer"), (3, "adaptformer"), (4, "lora")):
        taken = sj.banks.take(bank, slot)
        assert_rounding(alone(taken, images), alone(made[name], images), size=256)
    changed = sj.banks.put(bank, 6, made["houlsby"])
    found = run(sj.banks.remove(changed, 3), rows.at[3].set(6), images)
    assert run._cache_size() == 1
    np.testing.assert_array_equal(found[:2], base[:2])
    assert_rounding(found[3], alone(made["houlsby"], images)[3], size=256)


def test_generation_with_a_cache_gives_each_row_its_own_modules_tokens():
    """Against the model with that module alone, without a bank and without a cache."""
    module = Llama(small_llama(scan_layers=True))
    prompt = np.random.default_rng(5).integers(0, 64, (4, 6))
    params = jax.jit(module.init)(KEY, prompt)["params"]
    fn = lambda p, t: module.apply({"params": p}, t)
    roles = sj.roles(fn, params, prompt)
    rules = (
        {"**/down/kernel": sj.bottleneck(4, activation="gelu", bias=False)},
        {"**/{gate,down}/kernel": sj.bottleneck(5, placement="parallel", reads="gate", scale=0.3)},
        {"**/kernel": sj.lora(3)},
    )
    made = [filled(sj.adapt(params, rule, key=KEY, roles=roles), i) for i, rule in enumerate(rules)]
    rows = jnp.array([3, 0, 2, 1])
    found = np.asarray(greedy_decode(module, sj.bank(params, made), prompt, 4, rows=rows))
    changed = (found != np.asarray(greedy_decode(module, params, prompt, 4))).any(1)
    np.testing.assert_array_equal(changed, rows != 0)
    alone = jax.jit(sj.with_adapters(fn))
    for row, text in zip(np.asarray(rows), found, strict=True):
        # Causal: what stands at a place depends on nothing behind it, so one pass judges all tokens.
        answer = text[-4:]
        whole = np.concatenate([prompt[list(rows).index(row)], answer])[None]
        logits = np.asarray(alone([params, *made][row], whole))
        np.testing.assert_array_equal(logits[0, -5:-1].argmax(-1), answer)


def mlp(p, x):
    for i in range(3):
        layer = p[str(i)]
        x = (
            x
            + jnp.tanh(x @ layer["fc1"]["kernel"] + layer["fc1"]["bias"]) @ layer["fc2"]["kernel"]
            + layer["fc2"]["bias"]
        )
    return x


def mlp_params(width=64):
    draw = lambda *s: jnp.asarray(np.random.default_rng(0).normal(size=s) / 8, jnp.float32)
    layer = lambda: {
        "fc1": {"kernel": draw(width, 2 * width), "bias": draw(2 * width)},
        "fc2": {"kernel": draw(2 * width, width), "bias": draw(width)},
    }
    return {str(i): layer() for i in range(3)}


@pytest.mark.parametrize("method", ["sequential", "parallel"])
@pytest.mark.parametrize("backward", [False, True])
def test_operations_and_bytes_are_those_of_one_module(method, backward):
    params = mlp_params()
    rule = {"*/{fc1,fc2}/kernel": parallel(4)} if method == "parallel" else {"*/fc2/{kernel,bias}": sj.bottleneck(4)}
    one = filled(sj.adapt(params, rule, key=KEY), 0)
    bank = sj.bank(params, [one] * 8, trainable=True)
    x, rows = jnp.ones((8, 16, 64)), jnp.arange(8)

    def cost(tree, run, *args):
        trainable, frozen = sj.partition(tree)
        loss = lambda t, f, *args: jnp.sum(run(sj.combine(t, f), *args) ** 2)
        program = jax.jit(jax.grad(loss) if backward else loss).lower(trainable, frozen, *args).compile()
        return program.cost_analysis()["flops"], program.memory_analysis().temp_size_in_bytes

    flops, bytes_of_one = cost(one, sj.with_adapters(mlp), x)
    bank_flops, bank_bytes = cost(bank, sj.per_row(mlp), rows, x)
    assert bank_flops <= 1.05 * flops
    assert bank_bytes <= bytes_of_one + 3 * 3 * 8 * (2 * 4 * 64 + 4 + 64) * 4


def test_bad_input_is_refused():
    params = mlp_params(8)
    sequential = {"*/fc2/{kernel,bias}": sj.bottleneck(3)}
    adapted = sj.adapt(params, sequential, key=KEY)
    bank, x = sj.bank(params, [adapted]), jnp.ones((2, 8))
    with pytest.raises(MaterializeError, match=r"sj\.per_row"):
        sj.with_adapters(mlp)(bank, x)
    with pytest.raises(NotMergeableError, match=r"^0/fc2/kernel, "):
        sj.merge(bank)
    with pytest.raises(StructureError, match=r"^0/fc2/bias: adapter 0 stands on other numbers"):
        sj.bank(jax.tree.map(lambda v: v + 1.0, params), [adapted])
    with pytest.raises(StructureError, match=r"^0/fc2/kernel: .* 3 hidden features, .* made for 2.*size=3"):
        sj.bank(params, [adapted], size=2)
    wider = sj.adapt(params, {"*/fc2/{kernel,bias}": sj.bottleneck(4)}, key=KEY)
    with pytest.raises(StructureError, match=r"^0/fc2/kernel: .* 4 hidden features, .* made for 3.*size=4"):
        sj.banks.put(bank, 1, wider)
    roomy = sj.banks.put(sj.bank(params, [adapted], size=6, slots=3), 2, wider)
    assert roomy["0"]["fc2"]["kernel"].module.down.shape == (3, 8, 6)
    with pytest.raises(StructureError, match=r"^\d/fc\d/kernel: .*Make the bank with this adapter among the first"):
        sj.banks.put(bank, 1, sj.adapt(params, {"*/{fc1,fc2}/kernel": parallel(3)}, key=KEY))
    other = sj.adapt(params, {"*/fc2/{kernel,bias}": sj.bottleneck(3, activation="silu")}, key=KEY)
    with pytest.raises(StructureError, match=r"^0/fc2/kernel: .*no adapter of the bank has had one of this kind"):
        sj.banks.put(bank, 1, other)
    with pytest.raises(StructureError, match=r"^0/fc2/kernel: .*no adapter of the bank has had one of this kind"):
        sj.banks.put(bank, 1, sj.adapt(params, {"*/fc2/kernel": sj.lora(2)}, key=KEY))
    dora = sj.adapt(params, {"*/fc2/kernel": sj.dora(sj.lora(2))}, key=KEY)
    with pytest.raises(StructureError, match=r"^0/fc2/kernel: a magnitude of DoRA learns.*without trainable=True"):
        sj.bank(params, [adapted, dora], trainable=True)
    with pytest.raises(StructureError, match=r"^0/fc2/bias: adapter 0 has a Full"):
        sj.bank(params, [sj.adapt(params, {"0/fc2/bias": sj.full()}, key=KEY)])
    sparse = sj.methods.queryable_lora.queryable_lora(
        4, blocks=("0/**", "1/**", "2/**"), head="**/fc1/kernel", atoms=3, kept=2
    )
    wide = sj.methods.queryable_lora.queryable_lora(
        3, blocks=("0/**", "1/**", "2/**"), head="**/fc1/kernel", atoms=3, kept=2
    )
    trees = [sj.adapt(params, {"*/*/kernel": m}, key=KEY) for m in (sparse, wide)]
    with pytest.raises(StructureError, match=r"kernel: adapters whose modules share arrays .* same options"):
        sj.bank(params, trees)


def test_experts_of_another_number_lie_beside():
    """Pools of one and of two tasks differ in more than padded sizes, so each kind is a stack of its own."""
    params, igsp = mlp_params(8), sj.methods.igsp.igsp
    made = [
        filled(sj.adapt(params, {"*/{fc1,fc2}/kernel": igsp(3, tasks=n, reads="fc1", noise=False)}, key=KEY), n)
        for n in (1, 2)
    ]
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 8)), jnp.float32)
    found = jax.jit(sj.per_row(mlp))(sj.bank(params, made), jnp.array([2, 0, 1]), x)
    for i, tree in enumerate((made[1], params, made[0])):
        assert_rounding(found[i], jax.jit(sj.with_adapters(mlp))(tree, x[i : i + 1])[0], size=256)
