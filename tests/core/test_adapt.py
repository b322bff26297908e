import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import subspace_jax as sj
from subspace_jax.core import Full, NonFiniteError, PatternError, RoleError, StatisticsError, key_for
from subspace_jax.weights import LowRank
from tests.tolerances import tolerance

from .helpers import lora, normal

KEY = jax.random.key(0)


def tree():
    return {
        "encoder": {
            "layer_0": {"query": {"kernel": normal(0, 4, 4), "bias": normal(1, 4)}, "out": {"kernel": normal(2, 4, 4)}},
            "layer_1": {"query": {"kernel": normal(3, 4, 4), "bias": normal(4, 4)}, "out": {"kernel": normal(5, 4, 4)}},
        },
        "head": {"kernel": normal(6, 4, 2)},
        "step": np.int32(3),
    }


def methods(adapted):
    return {row.path: row.method for row in sj.summary(adapted) if row.method}


def test_first_matching_rule_wins():
    rules = [
        ("encoder/layer_1/**", None),
        ("**/query/kernel", lora()),
        ("encoder/**/kernel", sj.pissa(1)),
        ("**/bias", sj.full()),
    ]
    adapted = sj.adapt(tree(), rules, key=KEY)
    assert methods(adapted) == {
        "encoder/layer_0/out/kernel": "pissa",
        "encoder/layer_0/query/bias": "full",
        "encoder/layer_0/query/kernel": "lora",
    }
    untouched = adapted["encoder"]["layer_1"]["out"]["kernel"]
    assert untouched is not None
    np.testing.assert_array_equal(untouched, tree()["encoder"]["layer_1"]["out"]["kernel"])


def test_predicates_see_path_and_array():
    seen = []

    def square(path, array):
        seen.append((path, array.shape))
        return array.ndim == 2 and array.shape[0] == array.shape[1] and "layer_0" in path

    adapted = sj.adapt(tree(), [(square, lora()), ("head/*", sj.full())], key=KEY)
    assert methods(adapted) == {
        "encoder/layer_0/out/kernel": "lora",
        "encoder/layer_0/query/kernel": "lora",
        "head/kernel": "full",
    }
    assert ("head/kernel", (4, 2)) in seen


def test_structure_dtype_and_shape_of_the_tree_stay():
    params = tree()
    adapted = sj.adapt(params, {"**/kernel": lora()}, key=KEY)
    same = jax.tree.structure(adapted, is_leaf=sj.core.is_weight)
    assert same == jax.tree.structure(params)
    for old, new in zip(jax.tree.leaves(params), jax.tree.leaves(adapted, is_leaf=sj.core.is_weight), strict=True):
        assert (new.shape, new.dtype) == (old.shape, old.dtype)


def test_every_rule_must_match_and_the_error_lists_nearest_paths():
    with pytest.raises(
        PatternError, match=r"'\*\*/qury/kernel' matches no leaf.*encoder/layer_[01]/query/kernel.*\*\*"
    ):
        sj.adapt(tree(), {"**/kernel": lora(), "**/qury/kernel": lora()}, key=KEY)
    with pytest.raises(PatternError, match=r"matches no leaf.*the tree has 8 leaves"):
        sj.adapt(tree(), [(lambda path, array: False, lora())], key=KEY)
    with pytest.raises(PatternError, match=r"matches no leaf.*'head/kernel'"):
        sj.adapt(tree(), {"head/kernal": lora()}, key=KEY)
    with pytest.raises(PatternError, match="no leaves"):
        sj.adapt({}, {"**": lora()}, key=KEY)


def test_a_rule_that_earlier_ones_leave_nothing_is_an_error_that_names_them():
    for rules in (
        {"**/kernel": lora(), "head/kernel": sj.lora(4)},
        [("**/query/*", lora()), ("**/kernel", None), ("**/layer_0/out/kernel", sj.full())],
        [("**/kernel", None), ("head/*", lora())],
    ):
        (*_, last) = [selector for selector, _ in (rules.items() if isinstance(rules, dict) else rules)]
        with pytest.raises(PatternError) as found:
            sj.adapt(tree(), rules, key=KEY)
        assert f"Rule {last!r} decides on no leaf" in str(found.value)
        assert "'**/kernel'. The first matching rule wins" in str(found.value)
    rules = {"head/kernel": sj.lora(4), "**/kernel": sj.lora(2)}
    assert {row.path: row.rank for row in sj.summary(sj.adapt(tree(), rules, key=KEY))}["head/kernel"] == 4


def test_a_tuple_of_selectors_is_one_rule_and_each_of_them_must_match():
    rules = {("head/*", "**/layer_1/**/kernel", lambda path, array: path.endswith("bias")): sj.full()}
    adapted = sj.adapt(tree(), rules, key=KEY)
    assert sorted(methods(adapted)) == sorted(
        ["head/kernel", *(f"encoder/layer_1/{n}/kernel" for n in ("query", "out"))]
        + [f"encoder/layer_{i}/query/bias" for i in range(2)]
    )
    with pytest.raises(PatternError, match=r"Rule 'haed/\*' matches no leaf.*'head/kernel'"):
        sj.adapt(tree(), {("haed/*", "**/kernel"): sj.full()}, key=KEY)
    with pytest.raises(TypeError, match=r"Rule 3 is a int; expected a glob"):
        sj.adapt(tree(), {3: sj.full()}, key=KEY)


def test_a_role_for_no_leaf_is_refused_but_other_collections_may_be_there():
    role = sj.Role.dense()
    with pytest.raises(PatternError, match=r"roles: 'haed/kernel' matches no leaf; nearest paths: 'head/kernel'"):
        sj.adapt(tree(), {"head/kernel": lora()}, key=KEY, roles={"haed/kernel": role})
    with pytest.raises(PatternError, match=r"roles: '\*\*/kernl'"):
        sj.adapt(tree(), {"head/kernel": lora()}, key=KEY, roles={"**/kernel": role, "**/kernl": role})
    variables = {"params/head/kernel": role, "batch_stats/norm/mean": sj.Role("other")}
    assert methods(sj.adapt(tree(), {"head/kernel": lora()}, key=KEY, roles=variables))
    with pytest.raises(PatternError, match=r"roles: 'params/haed/kernel'"):
        sj.adapt(tree(), {"head/kernel": lora()}, key=KEY, roles={**variables, "params/haed/kernel": role})


def test_methods_of_equal_settings_plan_together_and_others_apart():
    def planned(settings):
        def plan(key, leaves):
            def init(key, array, role, stats):
                return sj.full().init(key, array * len(leaves), role, stats)

            return dict.fromkeys(leaves, init)

        return sj.Method("planned", sj.full().init, plan=plan, settings=settings)

    def counts(*settings):
        rules = dict(zip("ab", map(planned, settings), strict=True))
        adapted = sj.adapt({"a": jnp.ones(1), "b": jnp.ones(1)}, rules, key=KEY)
        return [float(adapted[name].value[0]) for name in "ab"]

    assert counts((1, 2), (1, 2)) == [2, 2]
    assert counts((1, 2), (1, 3)) == counts(None, None) == [1, 1]


def test_nothing_adapted_is_an_error():
    with pytest.raises(PatternError, match="Nothing would be adapted"):
        sj.adapt(tree(), {"**": None}, key=KEY)
    for rules in ({}, []):
        with pytest.raises(PatternError, match="No rules"):
            sj.adapt(tree(), rules, key=KEY)


def test_what_is_no_method_is_refused_with_the_mend():
    for wrong in (sj.lora, 8, "lora"):
        with pytest.raises(TypeError, match=r"head/kernel: .*sj.lora\(rank=8\)"):
            sj.adapt(tree(), {"head/kernel": wrong}, key=KEY)


def test_leaves_that_cannot_learn():
    with pytest.raises(PatternError, match=r"step: holds int32.*floating"):
        sj.adapt(tree(), {"step": sj.full()}, key=KEY)
    zero_gradient = np.zeros((2, 2), jax.dtypes.float0)
    with pytest.raises(PatternError, match=r"g: .*floating"):
        sj.adapt({"g": zero_gradient, "w": normal(0, 2, 2)}, {"g": sj.full()}, key=KEY)
    with pytest.raises(PatternError, match=r"name: holds str"):
        sj.adapt({"name": "x"}, {"name": sj.full()}, key=KEY)
    with pytest.raises(PatternError, match=r"k: holds key.*floating"):
        sj.adapt({"k": KEY}, {"k": sj.full()}, key=KEY)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_weights_that_are_not_finite(bad, dtype):
    params = tree()
    params["head"]["kernel"] = params["head"]["kernel"].astype(dtype)
    params["head"]["kernel"][1, 1] = bad
    with pytest.raises(NonFiniteError, match=r"head/kernel: .*NaN or infinity"):
        sj.adapt(params, {"**/kernel": lora()}, key=KEY)
    sj.adapt(params, {"encoder/**/kernel": lora()}, key=KEY)


def test_adapted_leaf_is_not_adapted_again():
    adapted = sj.adapt(tree(), {"head/*": lora()}, key=KEY)
    with pytest.raises(PatternError, match=r"head/kernel: is already a LowRank made by 'lora'.*merge\(\)"):
        sj.adapt(adapted, {"head/*": sj.full()}, key=KEY)
    more = sj.adapt(adapted, [("head/*", None), ("**/bias", sj.full())], key=KEY)
    assert methods(more)["head/kernel"] == "lora"


def test_more_than_two_axes_need_a_role():
    params = {"heads": {"kernel": normal(0, 4, 2, 3)}}
    with pytest.raises(RoleError, match=r"heads/kernel: .*\(4, 2, 3\) has 3 axes.*sj.roles\(fn, params"):
        sj.adapt(params, {"**": lora()}, key=KEY)
    role = sj.Role.dense((0,), (1, 2))
    for roles in ({"heads/kernel": role}, {"**/kernel": role}, {"params/heads/kernel": role}):
        assert sj.adapt(params, {"**": lora()}, key=KEY, roles=roles)["heads"]["kernel"].b.shape == (2, 6)
    with pytest.raises(RoleError, match=r"heads/kernel: .*do not cover"):
        sj.adapt(params, {"**": lora()}, key=KEY, roles={"**": sj.Role.dense((0,), (1,))})
    assert isinstance(sj.adapt(params, {"**": sj.full()}, key=KEY)["heads"]["kernel"], Full)


@pytest.mark.parametrize("shape", [(), (4,)])
def test_arrays_that_are_no_matrix(shape):
    with pytest.raises(RoleError, match=r"w: .*no matrix.*full\(\)"):
        sj.adapt({"w": normal(0, *shape)}, {"w": lora()}, key=KEY)
    assert sj.adapt({"w": normal(0, *shape)}, {"w": sj.full()}, key=KEY)["w"].shape == shape


def test_role_of_a_bias_is_refused_by_its_kind():
    params = {"w": normal(0, 3, 4)}
    with pytest.raises(RoleError, match=r"w: .*'bias'"):
        sj.adapt(params, {"w": lora()}, key=KEY, roles={"w": sj.Role("bias")})


def test_missing_statistics_name_what_to_capture():
    needy = lora()._replace(name="needy", needs=("gram", "mean"))
    with pytest.raises(StatisticsError, match=r"head/kernel: needy needs gram, mean.*sj.capture.*\('gram', 'mean'\)"):
        sj.adapt(tree(), {"head/kernel": needy}, key=KEY)
    stats = sj.capture(lambda p, x: x @ p["head"]["kernel"], tree(), [normal(9, 3, 4)])
    with pytest.raises(StatisticsError, match=r"head/kernel: needy needs mean, which"):
        sj.adapt(tree(), {"head/kernel": needy}, key=KEY, stats=stats)
    seen = []

    def init(key, array, role, stats):
        seen.append(stats)
        return lora().init(key, array, role, stats)

    sj.adapt(tree(), {"head/kernel": sj.Method("m", init, ("gram",))}, key=KEY, stats=stats)
    assert seen[0].gram.shape == (4, 4)


def test_keys_depend_on_the_path_alone():
    params = {"a": normal(0, 6, 4), "b": normal(0, 6, 4)}
    both = sj.adapt(params, {"*": lora()}, key=KEY)
    alone = sj.adapt({"b": params["b"]}, {"b": lora()}, key=KEY)
    np.testing.assert_array_equal(both["b"].a, alone["b"].a)
    assert not np.array_equal(both["a"].a, both["b"].a)
    other = sj.adapt(params, {"*": lora()}, key=jax.random.key(1))
    assert not np.array_equal(both["a"].a, other["a"].a)
    legacy = sj.adapt(params, {"*": lora()}, key=jax.random.PRNGKey(0))
    assert legacy["a"].a.shape == both["a"].a.shape
    assert not np.array_equal(jax.random.key_data(key_for(KEY, "a")), jax.random.key_data(key_for(KEY, "b")))


def test_abstract_and_jitted():
    params = tree()
    make = lambda p: sj.adapt(p, {"**/kernel": lora()}, key=KEY)
    abstract = jax.eval_shape(make, params)
    assert abstract["head"]["kernel"].a.shape == (4, 2)
    assert isinstance(abstract["head"]["kernel"].a, jax.ShapeDtypeStruct)
    jitted = jax.jit(make)(params)
    np.testing.assert_allclose(jitted["head"]["kernel"].a, make(params)["head"]["kernel"].a, rtol=tolerance())
    closed_over = jax.jit(lambda: make(params))()
    np.testing.assert_array_equal(closed_over["head"]["kernel"].base, params["head"]["kernel"])
    assert sj.summary(abstract).trainable == sj.summary(jitted).trainable == 2 * (4 * 8 + 6)


def test_numpy_arrays_become_nothing_else():
    """Nothing is copied: the base is the array that came."""
    params = {"w": jnp.asarray(normal(0, 4, 3))}
    adapted = sj.adapt(params, {"w": lora()}, key=KEY)
    assert adapted["w"].base is params["w"]


def test_no_warnings_and_nothing_computed_before_the_checks():
    made = []

    def init(key, array, role, stats):
        made.append(array.shape)
        return lora().init(key, array, role, stats)

    params = {"a": normal(0, 4, 3), "b": np.full((4, 3), np.nan, np.float32)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(NonFiniteError):
            sj.adapt(params, {"*": sj.Method("spy", init)}, key=KEY)
    assert made == []


def test_error_of_a_method_names_path_and_method():
    with pytest.raises(sj.core.RankError, match=r"head/kernel: pissa: rank=3 .*smaller side 2"):
        sj.adapt(tree(), {"head/kernel": sj.pissa(3)}, key=KEY)


def test_method_name_is_kept():
    assert isinstance(sj.adapt(tree(), {"head/*": lora()}, key=KEY)["head"]["kernel"], LowRank)
    assert sj.adapt(tree(), {"head/*": sj.dora(lora())}, key=KEY)["head"]["kernel"].method == "dora(lora)"
