import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import models
from subspace_jax.core import Role, leaves_with_paths
from subspace_jax.io import ManifestError, NameMap, NameRule, bert_names, dinov2_names, llama_names
from subspace_jax.io.peft._names import require_places


def shaped(*shape):
    return np.zeros(shape, np.float32)


def test_placeholders_and_stacks():
    names = NameMap(
        (
            NameRule("tower/layer_{layer}/fc", "net.{layer}.linear"),
            NameRule("tower/layers/fc", "net.{layer}.linear"),
            NameRule("moe/{layer}/experts/up", "moe.{layer}.experts.{expert}.up"),
        )
    )
    places = names.places(
        {
            "tower/layer_11/fc/kernel": shaped(4, 5),
            "other/fc/kernel": shaped(4, 5),
            "tower/layer_x/fc/kernel": shaped(4, 5),
            "tower/layer_07/fc/kernel": shaped(4, 5),
            "tower/layer_3/fc/extra": shaped(4, 5),
            "moe/2/experts/up/kernel": shaped(3, 4, 5),
        }
    )
    assert {path: place.modules for path, place in places.items()} == {
        "tower/layer_11/fc/kernel": ("net.11.linear",),
        "moe/2/experts/up/kernel": ("moe.2.experts.0.up", "moe.2.experts.1.up", "moe.2.experts.2.up"),
    }
    stacked = names.places({"tower/layers/fc/kernel": shaped(2, 4, 5), "tower/layers/fc/bias": shaped(2, 5)})
    assert [place.modules for place in stacked.values()] == [("net.0.linear", "net.1.linear")] * 2
    assert [place.tensor for place in stacked.values()] == ["weight", "bias"]
    assert stacked["tower/layers/fc/kernel"].role == Role.dense((1,), (2,), (0,))
    assert not stacked["tower/layers/fc/bias"].role.is_matrix


def test_two_stacked_axes_run_row_by_row():
    place = NameMap((NameRule("a", "l.{layer}.e.{expert}"),)).places({"a/kernel": shaped(2, 3, 4, 5)})["a/kernel"]
    assert place.modules[:4] == ("l.0.e.0", "l.0.e.1", "l.0.e.2", "l.1.e.0")
    assert place.stack == (2, 3)
    assert place.inner == (4, 5)


@pytest.mark.parametrize(
    ("rule", "shape", "role"),
    [
        (NameRule("a", "m", inputs=2), (2, 3, 4), Role.dense((0, 1), (2,))),
        (NameRule("a", "m"), (2, 3, 4), Role.dense((0,), (1, 2))),
        (NameRule("a", "m", "conv"), (3, 3, 4, 5), Role.conv()),
        (NameRule("a", "m.{l}", "embedding"), (2, 7, 4), Role("embedding", (0,), (1,), (2,))),
    ],
)
def test_roles(rule, shape, role):
    leaf = "a/embedding" if rule.kind == "embedding" else "a/kernel"
    assert NameMap((rule,)).places({leaf: shaped(*shape)})[leaf].role == role


def test_bad_rules():
    with pytest.raises(ValueError, match="kind='linear'; choose from dense"):
        NameRule("a", "b", "linear")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"placeholders \['layer'\] of the path and \[\]"):
        NameRule("layer_{layer}", "b")
    with pytest.raises(ValueError, match="each once"):
        NameRule("a", "b.{i}.{i}")


def test_two_leaves_of_one_name():
    names = NameMap((NameRule("a", "m"), NameRule("b", "m")))
    with pytest.raises(ManifestError, match=r"b/kernel: the NameMap calls it m.weight, which is a/kernel already"):
        names.places({"a/kernel": shaped(2, 3), "b/kernel": shaped(2, 3)})


def test_too_few_axes():
    with pytest.raises(ManifestError, match=r"a/kernel: has shape \(2, 3\).* 1 leading axes for \('layer',\)"):
        NameMap((NameRule("a", "m.{layer}"),)).places({"a/kernel": shaped(2, 3)})


def test_missing_names_are_told_together():
    names = NameMap((NameRule("enc/query", "q"),))
    with pytest.raises(ManifestError, match=r"'enc/qery/kernel'; nearest of the map are 'enc/query/kernel'(.|\n)*'x'"):
        require_places(["enc/qery/kernel", "x"], {}, names)


def test_the_first_rule_wins_and_maps_add():
    names = NameMap((NameRule("a", "first"),)) + NameMap((NameRule("a", "second"), NameRule("b", "third")))
    places = names.inside("backbone", "model").places({"backbone/a/kernel": shaped(2, 3), "a/kernel": shaped(2, 3)})
    assert {path: place.modules for path, place in places.items()} == {"backbone/a/kernel": ("model.first",)}


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize(
    ("names", "model"),
    [
        (
            bert_names(),
            lambda scan: (models.Bert(models.small_bert(scan_layers=scan)), jnp.ones((1, 4), jnp.int32)),
        ),
        (
            dinov2_names(),
            lambda scan: (models.Vit(models.small_vit(scan_layers=scan)), jnp.ones((1, 8, 8, 3))),
        ),
        (
            llama_names(tie_embeddings=False),
            lambda scan: (
                models.Llama(models.small_llama(scan_layers=scan, tie_embeddings=False)),
                jnp.ones((1, 4), jnp.int32),
            ),
        ),
    ],
    ids=["bert", "dinov2", "llama"],
)
def test_ready_maps_name_every_module(names, model, scan_layers):
    module, x = model(scan_layers)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    leaves = dict(leaves_with_paths(shapes))
    places = names.places(leaves)
    assert places.keys() == leaves.keys()
    layers = [name for place in places.values() for name in place.modules if ".layer" in name]
    assert {name.split(".layer")[1].split(".")[1] for name in layers if "layernorm" not in name} >= {"0", "1"}


def test_dinov2_of_both_versions():
    five, four = (
        {name for rule in dinov2_names(version).rules for name in [rule.module.split("{layer}.")[-1]]}
        for version in (5, 4)
    )
    assert {"attention.q_proj", "attention.o_proj"} <= five - four
    assert {"attention.attention.query", "attention.output.dense"} <= four - five
    with pytest.raises(ValueError, match="transformers=3"):
        dinov2_names(3)  # pyright: ignore[reportArgumentType]
