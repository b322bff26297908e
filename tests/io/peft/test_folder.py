"""Folders as PEFT writes them, made by hand; what PEFT itself reads and writes is in tests/interop."""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import subspace_jax as sj
from subspace_jax.io import (
    AdapterFileError,
    NameMap,
    NameRule,
    load_peft,
    read_safetensors,
    save_peft,
    write_safetensors,
)
from tests.tolerances import assert_rounding, tolerance

RNG = np.random.default_rng(0)
NAMES = NameMap(
    (
        NameRule("layers/fc", "net.layers.{layer}.fc"),
        NameRule("layers/norm", "net.layers.{layer}.norm", "vector"),
        NameRule("heads", "net.heads", inputs=2),
        NameRule("conv", "net.conv", "conv"),
        NameRule("table", "net.table", "embedding"),
        NameRule("tied", "net.tied", "embedding", shared=True),
        NameRule("out", "net.out"),
    )
)
PREFIX = "base_model.model.net."
LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 6}
OFT = {"peft_type": "OFT", "r": 0, "oft_block_size": 4, "peft_version": "0.18.0", "use_cayley_neumann": True}


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


@pytest.fixture
def params():
    return jax.tree.map(
        jnp.asarray,
        {
            "layers": {
                "fc": {"kernel": normal(3, 8, 6), "bias": normal(3, 6)},
                "norm": {"scale": normal(3, 6), "bias": normal(3, 6)},
            },
            "heads": {"kernel": normal(2, 3, 5), "bias": normal(5)},
            "conv": {"kernel": normal(3, 2, 4, 5)},
            "table": {"embedding": normal(9, 4)},
            "tied": {"embedding": normal(9, 4)},
            "out": {"kernel": normal(8, 6), "bias": normal(6)},
            "unnamed": {"kernel": normal(8, 6)},
        },
    )


ROLES = {
    "layers/fc/kernel": sj.Role.dense((1,), (2,), (0,)),
    "heads/kernel": sj.Role.dense((0, 1), (2,)),
    "conv/kernel": sj.Role.conv(),
    "{table,tied}/embedding": sj.Role.embedding(),
}


def adapt(params, rules, **options):
    """Adapters that do something: both factors are drawn."""
    trainable, frozen = sj.partition(sj.adapt(params, rules, key=jax.random.key(0), roles=ROLES, **options))
    trainable = jax.tree.map(lambda v: jnp.asarray(normal(*v.shape), v.dtype), trainable)
    return sj.combine(trainable, frozen)


def write(folder, tensors, config=LORA):
    folder.mkdir(exist_ok=True)
    write_safetensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def lora_pair(name, inputs=8, outputs=6, rank=2):
    return {
        f"{PREFIX}{name}.lora_A.weight": normal(rank, inputs),
        f"{PREFIX}{name}.lora_B.weight": normal(outputs, rank),
    }


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def merged(tree, *path):
    leaf = sj.merge(tree)
    for name in path:
        leaf = leaf[name]
    return np.asarray(leaf)


class TestReading:
    def test_lora(self, params, tmp_path):
        tensors = lora_pair("out")
        tree = load_peft(write(tmp_path / "x", tensors), params, NAMES)
        a, b = tensors.values()
        np.testing.assert_allclose(merged(tree, "out", "kernel"), params["out"]["kernel"] + 3 * (b @ a).T, rtol=1e-5)
        assert tree["unnamed"]["kernel"] is params["unnamed"]["kernel"]
        assert tree["out"]["kernel"].base is params["out"]["kernel"]
        assert tree["out"]["kernel"].trainable == ("a", "b")

    def test_patterns_and_rank_stabilized_scale(self, params, tmp_path):
        tensors = lora_pair("out", rank=4)
        config = {**LORA, "rank_pattern": {"out": 4}, "alpha_pattern": {"net.out": 10}, "use_rslora": True}
        tree = load_peft(write(tmp_path / "x", tensors, config), params, NAMES)
        assert (tree["out"]["kernel"].scale, tree["out"]["kernel"].method) == (5.0, "rslora")

    def test_stacked_layers(self, params, tmp_path):
        tensors = {k: v for i in (2, 0, 1) for k, v in lora_pair(f"layers.{i}.fc").items()}
        tree = load_peft(write(tmp_path / "x", tensors), params, NAMES)
        for i in range(3):
            a, b = (tensors[f"{PREFIX}layers.{i}.fc.lora_{side}.weight"] for side in "AB")
            expected = params["layers"]["fc"]["kernel"][i] + 3 * (b @ a).T
            np.testing.assert_allclose(merged(tree, "layers", "fc", "kernel")[i], expected, rtol=1e-4, atol=1e-5)

    def test_part_of_a_stack(self, params, tmp_path):
        """The other layers stay as they are, in value and in training."""
        tensors = {**lora_pair("layers.0.fc"), **lora_pair("layers.2.fc")}
        config = {**LORA, "layers_to_transform": [0, 2]}
        tree = load_peft(write(tmp_path / "x", tensors, config), params, NAMES)
        kernel = np.asarray(params["layers"]["fc"]["kernel"])
        found = merged(tree, "layers", "fc", "kernel")
        np.testing.assert_array_equal(found[1], kernel[1])
        for i in (0, 2):
            a, b = (tensors[f"{PREFIX}layers.{i}.fc.lora_{side}.weight"].astype(np.float64) for side in "AB")
            assert_rounding(found[i], kernel[i] + 3 * (b @ a).T, size=2)
        trainable, frozen = sj.partition(tree)
        x = jnp.asarray(normal(3, 4, 8))
        loss = lambda t: jnp.sum((x @ sj.merge(sj.combine(t, frozen))["layers"]["fc"]["kernel"]) ** 2)
        gradient = jax.grad(loss)(trainable)["layers"]["fc"]["kernel"]
        assert np.abs(gradient.a[0]).max() > 0
        assert not np.any(gradient.a[1])
        assert not np.any(gradient.b[1])

    @pytest.mark.parametrize("stabilized", [False, True])
    def test_biases_of_the_second_factor(self, params, tmp_path, stabilized):
        tensors = {k: v for i in range(3) for k, v in lora_pair(f"layers.{i}.fc").items()} | lora_pair("out")
        biases = {name: normal(6) for name in ("layers.0.fc", "layers.1.fc", "layers.2.fc", "out")}
        tensors |= {f"{PREFIX}{name}.lora_B.bias": bias for name, bias in biases.items()}
        tensors[f"{PREFIX}out.base_layer.bias"] = trained = normal(6)
        config = {**LORA, "lora_bias": True, "use_rslora": stabilized, "alpha_pattern": {"out": 4}}
        tree = load_peft(write(tmp_path / "x", tensors, config), params, NAMES)
        root = np.sqrt(2) if stabilized else 2
        stacked = np.stack([biases[f"layers.{i}.fc"] for i in range(3)])
        assert_rounding(merged(tree, "layers", "fc", "bias"), params["layers"]["fc"]["bias"] + 6 / root * stacked)
        assert_rounding(merged(tree, "out", "bias"), trained + 4 / root * biases["out"])
        assert tree["heads"]["bias"] is params["heads"]["bias"]
        refused(params, write(tmp_path / "x", tensors), r"parts \['a', 'b', 'bias'\].*lora_bias=False")
        config = {**LORA, "lora_bias": True}
        refused(params, write(tmp_path / "x", lora_pair("out"), config), r"parts \['a', 'b'\].*lora_bias=True")
        bare = {**params, "out": {"kernel": params["out"]["kernel"]}}
        only = {k: v for k, v in tensors.items() if "out.lora" in k}
        refused(bare, write(tmp_path / "x", only, config), "lora_bias=True: module 'net.out' has no bias")

    @pytest.mark.parametrize("given", [[7, 0, 3], {"table": [7, 0, 3]}, {"net.table": [7, 0, 3]}])
    def test_rows_of_a_table(self, params, tmp_path, given):
        rows = normal(3, 4)
        tensors = {f"{PREFIX}table.token_adapter.trainable_tokens_delta": rows}
        config = {**LORA, "trainable_token_indices": given}
        tree = load_peft(write(tmp_path / "x", tensors, config), params, NAMES)
        expected = np.array(params["table"]["embedding"])
        expected[[7, 0, 3]] = rows
        np.testing.assert_array_equal(merged(tree, "table", "embedding"), expected)
        weight = tree["table"]["embedding"]
        assert (weight.trainable, weight.values.shape) == (("values",), (12,))
        assert np.all(np.diff(weight.indices) > 0)
        tied = {f"{PREFIX}tied.token_adapter.trainable_tokens_delta": rows}
        tree = load_peft(write(tmp_path / "y", tied, {**LORA, "trainable_token_indices": [7, 0, 3]}), params, NAMES)
        np.testing.assert_array_equal(merged(tree, "tied", "embedding")[[7, 0, 3]], rows)

    @pytest.mark.parametrize(
        ("given", "rows", "words"),
        [
            (None, (3, 4), "trainable_token_indices=None, and the file has such rows for .*net.table"),
            ([1, 2, 3], None, "trainable_token_indices=.*and the file has such rows for none"),
            ([1, 2], (3, 4), r"rows is \[3, 4\], expected \[2, 4\]"),
            ([1, 2, 2], (3, 4), "trainable_token_indices=.*different whole numbers below 9"),
            ([1, 2, 9], (3, 4), "trainable_token_indices=.*different whole numbers below 9"),
            ([1, 2, -1], (3, 4), "trainable_token_indices=.*different whole numbers below 9"),
            ([1, 2, True], (3, 4), "trainable_token_indices=.*different whole numbers below 9"),
            ("123", (3, 4), "trainable_token_indices=.*different whole numbers below 9"),
            ({"able": [1, 2, 3]}, (3, 4), "trainable_token_indices names 'able', of which the file has no rows"),
            ({"table": [1, 2, 3], "x": [1]}, (3, 4), "trainable_token_indices names 'x'"),
        ],
    )
    def test_rows_that_do_not_fit(self, params, tmp_path, given, rows, words):
        tensors = lora_pair("out")
        if rows is not None:
            tensors[f"{PREFIX}table.token_adapter.trainable_tokens_delta"] = normal(*rows)
        refused(params, write(tmp_path / "x", tensors, {**LORA, "trainable_token_indices": given}), rf"(?s){words}")

    def test_adapters_of_tied_modules(self, params, tmp_path):
        config = {**LORA, "ensure_weight_tying": True}
        table = {PREFIX + "tied.lora_embedding_A": normal(2, 9), PREFIX + "tied.lora_embedding_B": normal(4, 2)}
        folder = write(tmp_path / "x", {**table, **lora_pair("lm_head", 4, 9)}, config)
        refused(params, folder, "the config has ensure_weight_tying=True, .* no place in the tree")
        assert load_peft(write(tmp_path / "y", lora_pair("out"), config), params, NAMES)["out"]["kernel"].rank == 2

    def test_rows_and_factors_of_one_table(self, params, tmp_path):
        tensors = {f"{PREFIX}table.lora_embedding_A": normal(2, 9), f"{PREFIX}table.lora_embedding_B": normal(4, 2)}
        tensors[f"{PREFIX}table.token_adapter.trainable_tokens_delta"] = normal(1, 4)
        folder = write(tmp_path / "x", tensors, {**LORA, "trainable_token_indices": [2]})
        refused(params, folder, "table/embedding: the file adapts it in two ways at once")

    @pytest.mark.parametrize("start", ["pissa", "olora"])
    def test_starts_taken_out_of_the_base(self, params, tmp_path, start):
        tensors = {k: v for i in range(3) for k, v in lora_pair(f"layers.{i}.fc").items()}
        tensors |= lora_pair("heads", 6, 5)
        config = {**LORA, "init_lora_weights": start}
        tree = load_peft(write(tmp_path / "x", tensors, config), params, NAMES)

        def expected(name, kernel):
            w = kernel.astype(np.float64).T
            if start == "pissa":
                u, s, vt = np.linalg.svd(w, full_matrices=False)
                taken = (u[:, :2] * s[:2]) @ vt[:2]
            else:  # the projection onto the span of the first inputs, times the scale 3
                first = w[:, :2]
                taken = 3 * first @ np.linalg.pinv(first) @ w
            a, b = (tensors[f"{PREFIX}{name}.lora_{side}.weight"].astype(np.float64) for side in "AB")
            return (w - taken + 3 * b @ a).T

        for i in range(3):
            kernel = np.asarray(params["layers"]["fc"]["kernel"][i])
            assert_rounding(merged(tree, "layers", "fc", "kernel")[i], expected(f"layers.{i}.fc", kernel), size=8)
        kernel = np.asarray(params["heads"]["kernel"]).reshape(6, 5)
        assert_rounding(merged(tree, "heads", "kernel").reshape(6, 5), expected("heads", kernel), size=8)
        again = load_peft(save_peft(tmp_path / "y", tree, params, NAMES), params, NAMES)
        assert again["heads"]["kernel"].rank == 4
        for one, other in zip(jax.tree.leaves(sj.merge(again)), jax.tree.leaves(sj.merge(tree)), strict=True):
            assert_rounding(one, other, size=16)

    def test_starts_that_rounding_decides(self, params, tmp_path):
        equal = {**params, "out": {**params["out"], "kernel": jnp.eye(8, 6)}}
        refused(
            equal, write(tmp_path / "x", lora_pair("out"), {**LORA, "init_lora_weights": "pissa"}), "2 and 3 are eq"
        )
        twin = params["out"]["kernel"].at[1].set(params["out"]["kernel"][0])
        twins = {**params, "out": {**params["out"], "kernel": twin}}
        folder = write(tmp_path / "y", lora_pair("out"), {**LORA, "init_lora_weights": "olora"})
        refused(twins, folder, "init_lora_weights='olora': out/kernel: its first 2 inputs are dependent")
        conv = {PREFIX + "conv.lora_A.weight": normal(2, 4, 3, 2), PREFIX + "conv.lora_B.weight": normal(5, 2, 1, 1)}
        refused(params, write(tmp_path / "z", conv, {**LORA, "init_lora_weights": "olora"}), "conv/kernel is a conv")

    def test_dora(self, params, tmp_path):
        tensors = {**lora_pair("out"), f"{PREFIX}out.lora_magnitude_vector": np.abs(normal(6))}
        tree = load_peft(write(tmp_path / "x", tensors, {**LORA, "use_dora": True}), params, NAMES)
        a, b, magnitude = tensors.values()
        direction = params["out"]["kernel"] + 3 * (b @ a).T
        expected = direction / np.linalg.norm(direction, axis=0) * magnitude
        np.testing.assert_allclose(merged(tree, "out", "kernel"), expected, rtol=1e-4)

    def test_dropout_and_dtype(self, params, tmp_path):
        tensors = {k: v.astype(jnp.bfloat16) for k, v in lora_pair("out").items()}
        tree = load_peft(write(tmp_path / "x", tensors, {**LORA, "lora_dropout": 0.25}), params, NAMES)
        weight = tree["out"]["kernel"]
        assert (weight.dropout, weight.a.dtype, weight.dtype) == (0.25, jnp.bfloat16, jnp.float32)

    def test_biases_and_whole_modules(self, params, tmp_path):
        tensors = lora_pair("out")
        tensors |= {f"{PREFIX}out.base_layer.bias": normal(6), f"{PREFIX}heads.weight": normal(5, 6)}
        tensors |= {f"{PREFIX}layers.{i}.norm.weight": normal(6) for i in range(3)}
        tree = load_peft(write(tmp_path / "x", tensors), params, NAMES)
        np.testing.assert_array_equal(tree["out"]["bias"].value, tensors[f"{PREFIX}out.base_layer.bias"])
        expected = tensors[f"{PREFIX}heads.weight"].T.reshape(2, 3, 5)
        np.testing.assert_array_equal(tree["heads"]["kernel"].value, expected)
        np.testing.assert_array_equal(
            tree["layers"]["norm"]["scale"].value[2], tensors[f"{PREFIX}layers.2.norm.weight"]
        )
        assert tree["heads"]["bias"] is params["heads"]["bias"]

    @pytest.mark.parametrize("wide", [False, True])
    def test_randlora(self, params, tmp_path, wide):
        """The sum written out over ranks and bases, both flattened as PEFT flattens them."""
        name, (inputs, outputs) = ("table2", (6, 8)) if wide else ("out", (8, 6))
        params = {**params, "table2": {"kernel": jnp.asarray(normal(6, 8))}}
        names = NAMES + NameMap((NameRule("table2", "net.table2"),))
        a, b, scales, gamma = normal(4, 1, 7), normal(9, 2, 4), normal(4, 2), normal(2, 6)
        parts = {"A": a, "B": b, "lambda": scales, "gamma": gamma}
        tensors = {f"{PREFIX}{name}.randlora_{part}": tensor for part, tensor in parts.items()}
        config = {"peft_type": "RANDLORA", "r": 4, "randlora_alpha": 10, "save_projection": True}
        tree = load_peft(write(tmp_path / "x", tensors, config), params, names)
        scaled = (scales[:, :, None] * a[:, :, :6] * gamma).reshape(8, 6)
        fixed = b[:8].reshape(8, 8)
        delta = 2.5 * (fixed @ scaled)
        expected = params[name]["kernel"] + (delta.T if wide else delta)
        np.testing.assert_allclose(merged(tree, name, "kernel"), expected, rtol=1e-4, atol=1e-4)
        assert (inputs, outputs) == tree[name]["kernel"].shape

    @pytest.mark.parametrize("exact", [False, True])
    def test_oft(self, params, tmp_path, exact):
        tensors = {f"{PREFIX}out.oft_R.weight": 0.1 * normal(2, 6)}
        config = {**OFT, "use_cayley_neumann": not exact}
        tree = load_peft(write(tmp_path / "x", tensors, config), params, NAMES)
        blocks = []
        for entries in tensors[f"{PREFIX}out.oft_R.weight"].astype(np.float64):
            q = np.zeros((4, 4))
            q[np.triu_indices(4, 1)] = entries
            q = q - q.T
            eye, q2 = np.eye(4), q @ q
            # As PEFT has them: the exact transform turns the other way round.
            series = eye + 2 * q + 2 * q2 + 2 * q2 @ q + q2 @ q2
            blocks.append((eye - q) @ np.linalg.inv(eye + q) if exact else series)
        kernel = np.asarray(params["out"]["kernel"])
        expected = np.concatenate([blocks[0] @ kernel[:4], blocks[1] @ kernel[4:]])
        np.testing.assert_allclose(merged(tree, "out", "kernel"), expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(
        ("config", "shape", "size"),
        [
            ({"r": 3, "oft_block_size": 0}, (2, 6), 4),
            ({"oft_block_size": 5}, (2, 6), 4),
            ({"oft_block_size": 100}, (1, 28), 8),
            ({"block_share": True}, (1, 6), 4),
        ],
    )
    def test_block_sizes_of_oft(self, params, tmp_path, config, shape, size):
        tensors = {f"{PREFIX}out.oft_R.weight": normal(*shape)}
        tree = load_peft(write(tmp_path / "x", tensors, {**OFT, **config}), params, NAMES)
        assert tree["out"]["kernel"].block_size == size

    def test_constrained_oft_is_cut(self, params, tmp_path):
        tensors = {f"{PREFIX}out.oft_R.weight": np.stack([normal(6), 1e-3 * normal(6)])}
        config = {**OFT, "coft": True, "eps": 0.5}
        found = load_peft(write(tmp_path / "x", tensors, config), params, NAMES)["out"]["kernel"].skew_entries
        given = tensors[f"{PREFIX}out.oft_R.weight"]
        np.testing.assert_allclose(np.linalg.norm(found[0]) * np.sqrt(2), 0.5 / np.sqrt(2), rtol=1e-5)
        np.testing.assert_allclose(found[0] / given[0], np.full(6, (found[0] / given[0])[0]), rtol=1e-5)
        np.testing.assert_allclose(found[1], given[1], rtol=tolerance())

    def test_unknown_keys_are_warned_of(self, params, tmp_path):
        folder = write(tmp_path / "x", lora_pair("out"), {**LORA, "brand_new": 1})
        with pytest.warns(UserWarning, match=r"brand_new=1, not known here") as caught:
            load_peft(folder, params, NAMES)
        assert caught[0].filename == __file__

    def test_known_keys_are_not(self, params, tmp_path, recwarn):
        load_peft(
            write(tmp_path / "x", lora_pair("out"), {**LORA, "target_modules": "a|b", "bias": "none"}), params, NAMES
        )
        assert not recwarn.list

    def test_a_base_weight_that_came_along(self, params, tmp_path):
        tensors = {
            f"{PREFIX}table.lora_embedding_A": normal(2, 9),
            f"{PREFIX}table.lora_embedding_B": normal(4, 2),
            f"{PREFIX}table.base_layer.weight": np.asarray(params["table"]["embedding"]),
        }
        tree = load_peft(write(tmp_path / "x", tensors), params, NAMES)
        down, up, table = tensors.values()
        np.testing.assert_allclose(merged(tree, "table", "embedding"), table + 3 * down.T @ up.T, rtol=1e-4, atol=1e-5)
        tensors[f"{PREFIX}table.base_layer.weight"] = table + 1
        with pytest.raises(AdapterFileError, match=r"'net.table': the file holds its base weight too"):
            load_peft(write(tmp_path / "x", tensors), params, NAMES)


def refused(params, folder, match):
    with pytest.raises(AdapterFileError, match=match) as error:
        load_peft(folder, params, NAMES)
    assert folder.name in str(error.value)


class TestRefusing:
    @pytest.mark.parametrize(
        "name",
        [
            PREFIX + "outt.lora_A.weight",
            PREFIX + "out.lora_A.bias",
            PREFIX + "out.extra",
            PREFIX + "layers.3.fc.lora_A.weight",
            PREFIX + "out.oft_R.weight",
            PREFIX + "conv.bias",
            PREFIX + "lora_A.weight",
            PREFIX + "out.lora_embedding_A",
            PREFIX + "table.lora_A.weight",
            PREFIX + "out.oft_embedding_R.weight",
            "model.net.out.lora_A.weight",
            "lora_A.weight",
        ],
    )
    def test_unknown_tensors(self, params, tmp_path, name):
        folder = write(tmp_path / "x", {**lora_pair("out"), name: normal(2, 8), PREFIX + "other": normal(2)})
        refused(params, folder, rf"(?s)no place in the tree(?=.*'{name}')(?=.*'{PREFIX}other')")

    def test_two_tensors_of_one_place(self, params, tmp_path):
        tensors = {**lora_pair("out"), PREFIX + "out.base_layer.bias": normal(6), PREFIX + "out.bias": normal(6)}
        refused(params, write(tmp_path / "x", tensors), "out.bias', where another tensor has its place")

    def test_a_missing_factor(self, params, tmp_path):
        tensors = lora_pair("out")
        tensors.popitem()
        refused(params, write(tmp_path / "x", tensors), r"'net.out' has the parts \['a'\], expected \['a', 'b'\]")
        tensors = lora_pair("out")
        folder = write(tmp_path / "x", tensors, {**LORA, "use_dora": True})
        refused(params, folder, r"expected \['a', 'b', 'magnitude'\] \(use_dora=True, lora_bias=False\)")
        folder = write(tmp_path / "x", {**tensors, PREFIX + "out.lora_magnitude_vector": normal(6)})
        refused(params, folder, r"has the parts \['a', 'b', 'magnitude'\]")

    @pytest.mark.parametrize(
        ("sizes", "part"),
        [((7, 6, 2), r"a is \[2, 7\], expected \[2, 8\]"), ((8, 6, 3), r"expected \[2, 8\]"), ((8, 5, 2), r"b is")],
    )
    def test_misshapen_factors(self, params, tmp_path, sizes, part):
        refused(params, write(tmp_path / "x", lora_pair("out", *sizes)), rf"'net.out'.*out/kernel:(.|\n)*{part}")

    def test_misshapen_others(self, params, tmp_path):
        refused(
            params,
            write(tmp_path / "x", {**lora_pair("out"), PREFIX + "out.base_layer.bias": normal(5)}),
            r"'net.out'(.|\n)*bias is \[5\], expected \[6\]",
        )
        folder = write(tmp_path / "x", {PREFIX + "out.oft_R.weight": normal(2, 5)}, OFT)
        refused(params, folder, r"oft_R is \[2, 5\], expected \[2, 6\]")

    def test_part_of_a_stack(self, params, tmp_path):
        parts = ("0", "2")
        tensors = {k: v for i in parts for k, v in lora_pair(f"layers.{i}.fc").items()}
        tensors |= {f"{PREFIX}layers.{i}.fc.lora_magnitude_vector": normal(6) for i in parts}
        config = {**LORA, "use_dora": True, "layers_to_transform": [0, 2]}
        refused(params, write(tmp_path / "x", tensors, config), r"layers_to_transform: (.|\n)*for net.layers.1.fc\n")
        tensors = {f"{PREFIX}layers.1.fc.oft_R.weight": normal(2, 6)}
        refused(params, write(tmp_path / "x", tensors, OFT), r"layers_to_transform: (.|\n)*for net.layers.0.fc, net")
        tensors = {**lora_pair("out"), PREFIX + "layers.1.norm.weight": normal(6)}
        refused(params, write(tmp_path / "x", tensors), r"'layers/norm/scale': nothing for net.layers.0.norm, net")

    @pytest.mark.parametrize(
        ("ranks", "config", "what"),
        [((2, 3, 2), {"rank_pattern": {"1.fc": 3}}, "rank"), ((2, 2, 2), {"alpha_pattern": {"1.fc": 3}}, "scale")],
    )
    def test_unlike_layers_of_a_stack(self, params, tmp_path, ranks, config, what):
        tensors = {k: v for i, rank in enumerate(ranks) for k, v in lora_pair(f"layers.{i}.fc", rank=rank).items()}
        folder = write(tmp_path / "x", tensors, {**LORA, **config})
        refused(params, folder, rf"'net.layers.0.fc' has {what} .* and 'net.layers.1.fc' has .* one stack")

    def test_integers(self, params, tmp_path):
        tensors = {name: np.zeros(tensor.shape, np.int8) for name, tensor in lora_pair("out").items()}
        refused(params, write(tmp_path / "x", tensors), r"floating point(.|\n)*lora_A.weight' is int8")

    def test_tied_tables(self, params, tmp_path):
        tensors = {PREFIX + "tied.lora_embedding_A": normal(2, 9), PREFIX + "tied.lora_embedding_B": normal(4, 2)}
        refused(params, write(tmp_path / "x", tensors), "'net.tied': the model reads tied/embedding in other places")
        refused(params, write(tmp_path / "x", {PREFIX + "tied.weight": normal(9, 4)}), "'net.tied': the model reads")

    @pytest.mark.parametrize(
        ("config", "match"),
        [
            ({"peft_version": "0.17.1"}, "before 0.18"),
            ({"num_cayley_neumann_terms": 2}, "at least 3"),
            ({"oft_block_size": 0}, "expected one of them to be 0"),
            ({"r": 2}, "expected one of them to be 0"),
        ],
    )
    def test_configs_of_oft(self, params, tmp_path, config, match):
        refused(params, write(tmp_path / "x", {PREFIX + "out.oft_R.weight": normal(2, 6)}, {**OFT, **config}), match)

    def test_oft_before_blocks_had_sizes(self, params, tmp_path):
        config = {"peft_type": "OFT", "r": 2}
        tensors = {PREFIX + "out.oft_R.weight": normal(2, 6)}
        refused(params, write(tmp_path / "x", tensors, config), "no oft_block_size")
        config = {**config, "r": 0, "oft_block_size": 4}
        refused(params, write(tmp_path / "x", tensors, config), "no use_cayley_neumann")

    def test_oft_of_a_convolution(self, params, tmp_path):
        folder = write(tmp_path / "x", {PREFIX + "conv.oft_R.weight": normal(6, 6)}, OFT)
        refused(params, folder, r"conv/kernel: is a module of .*what a Rotated does to linear")

    @pytest.mark.parametrize("rank", [0, 2.5])
    def test_ranks(self, params, tmp_path, rank):
        folder = write(tmp_path / "x", lora_pair("out"), {**LORA, "rank_pattern": {"out": rank}})
        refused(params, folder, f"gives it rank {rank}, expected a whole number from 1")

    def test_bases_of_randlora(self, params, tmp_path):
        config = {"peft_type": "RANDLORA", "r": 4, "randlora_alpha": 10}

        def tensors(name, a=normal(4, 1, 6), b=normal(8, 2, 4), gamma=(2, 6)):  # noqa: B008
            parts = {"A": a, "B": b, "lambda": normal(4, 2), "gamma": normal(*gamma)}
            return {f"{PREFIX}{name}.randlora_{part}": tensor for part, tensor in parts.items()}

        for given, match in (
            (tensors("out") | tensors("heads", a=normal(4, 1, 6)), "has other bases than"),
            (tensors("out", a=normal(4, 6)), r"randlora_A is \[4, 6\]"),
            (tensors("out", a=normal(4, 1, 5)), "sides of 5 and 8, too small"),
            (tensors("out", b=normal(8, 1, 4)), "too small"),
            (tensors("out", gamma=(2, 5)), r"feature_scales is \[2, 5\], expected \[2, 6\]"),
            (tensors("out") | lora_pair("out"), "no place in the tree"),
            (dict(list(tensors("out").items())[1:]), "has not both random bases"),
            (dict(list(tensors("out").items())[:3]), "expected both of its scales"),
            (tensors("out") | {"base_model.randlora_A": normal(4, 1, 6)}, "has other bases than the first"),
        ):
            refused(params, write(tmp_path / "x", given, config), match)

    def test_an_empty_file(self, params, tmp_path):
        refused(params, write(tmp_path / "x", {}), "holds no adapter")

    def test_pickles(self, params, tmp_path):
        folder = write(tmp_path / "x", lora_pair("out"))
        (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
        refused(params, folder, "a pickle.*never read")

    def test_a_truncated_file(self, params, tmp_path):
        folder = write(tmp_path / "x", lora_pair("out"))
        file = folder / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-3])
        refused(params, folder, "truncated")

    def test_adapted_parameters(self, params, tmp_path):
        folder = write(tmp_path / "x", lora_pair("out"))
        refused(adapt(params, {"out/kernel": sj.lora(2)}), folder, "out/kernel: the base tree holds a LowRank")


class TestWriting:
    def test_factors(self, params, tmp_path):
        rules = {"{out,layers/fc,heads,conv}/kernel": sj.lora(2, alpha=3), "table/*": sj.lora(2, alpha=3)}
        tree = adapt(params, rules)
        folder = save_peft(tmp_path / "x", tree, params, NAMES, base_model="someone/model", task_type="CAUSAL_LM")
        tensors, metadata = read_safetensors(folder / "adapter_model.safetensors")
        assert metadata == {"format": "pt"}
        stacked = tree["layers"]["fc"]["kernel"]
        np.testing.assert_array_equal(tensors[PREFIX + "layers.1.fc.lora_A.weight"], stacked.a[1].T)
        np.testing.assert_array_equal(tensors[PREFIX + "layers.1.fc.lora_B.weight"], stacked.b[1].T)
        assert {
            name.removeprefix(PREFIX): tensor.shape for name, tensor in tensors.items() if "layers" not in name
        } == {
            "out.lora_A.weight": (2, 8),
            "out.lora_B.weight": (6, 2),
            "heads.lora_A.weight": (2, 6),
            "heads.lora_B.weight": (5, 2),
            "conv.lora_A.weight": (2, 4, 3, 2),
            "conv.lora_B.weight": (5, 2, 1, 1),
            "table.lora_embedding_A": (2, 9),
            "table.lora_embedding_B": (4, 2),
        }
        config = config_of(folder)
        modules = ["conv", "heads", "layers.0.fc", "layers.1.fc", "layers.2.fc", "out", "table"]
        assert config["target_modules"] == [f"net.{name}" for name in modules]
        expected = {"r": 2, "lora_alpha": 3, "rank_pattern": {}, "alpha_pattern": {}, "bias": "none"}
        expected |= {"base_model_name_or_path": "someone/model", "task_type": "CAUSAL_LM", "modules_to_save": None}
        assert {key: config[key] for key in expected} == expected

    @pytest.mark.parametrize(
        "rules",
        [
            {"**/kernel": sj.lora(2, alpha=3, dropout=0.5)},
            {"**/kernel": sj.lora(2, rank_stabilized=True), "table/*": sj.lora(3, rank_stabilized=True)},
            {"**/kernel": sj.dora(sj.lora(2, alpha=1 / 3))},
            {"**/{out,fc}/kernel": sj.oft(4)},
            {"**/{out,fc}/kernel": sj.oft(8, terms=6, share_blocks=True, dropout=0.5)},
            {"**/{out,fc,heads}/kernel": sj.randlora(2, pairing="peft")},
            {"out/kernel": sj.lora(2), "out/bias": sj.full(), "layers/norm/*": sj.full(), "heads/*": sj.full()},
        ],
    )
    def test_there_and_back(self, params, tmp_path, rules):
        del params["unnamed"]
        tree = adapt(params, rules)
        again = load_peft(save_peft(tmp_path / "x", tree, params, NAMES), params, NAMES)
        if "randlora" in str(rules):
            # The bases come padded to PEFT's sizes, so that it is the sums that are the same.
            for one, other in zip(*(jax.tree.leaves(sj.merge(t)) for t in (tree, again)), strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
            return
        for one, other in zip(*(jax.tree.leaves(t, is_leaf=sj.core.is_weight) for t in (tree, again)), strict=True):
            assert type(one) is type(other)
            if sj.core.is_weight(one):
                one, other = (dataclasses.replace(w, role=sj.Role("other")) for w in (one, other))
                assert other.method == one.method
                if hasattr(one, "scale"):
                    assert other.scale == pytest.approx(one.scale, rel=2**-22)
                    one = dataclasses.replace(one, scale=other.scale)
            for a, b in zip(*(jax.tree.leaves(v) for v in (one, other)), strict=True):
                np.testing.assert_array_equal(a, b)

    def test_patterns(self, params, tmp_path):
        rules = {
            "layers/fc/kernel": sj.lora(4, alpha=8),
            "out/kernel": sj.lora(2, alpha=8),
            "heads/kernel": sj.lora(4, alpha=0.5),
        }
        config = config_of(save_peft(tmp_path / "x", adapt(params, rules), params, NAMES))
        assert (config["r"], config["lora_alpha"]) == (4, 8)
        assert config["rank_pattern"] == {r"^net\.out$": 2}
        assert config["alpha_pattern"] == {r"^net\.heads$": 0.5}

    @pytest.mark.parametrize("residual", [None, jnp.bfloat16])
    def test_pissa_becomes_lora_of_twice_the_rank(self, params, tmp_path, residual):
        tree = adapt(params, {"{out,layers/fc}/kernel": sj.pissa(2, alpha=6, residual_dtype=residual)})
        folder = save_peft(tmp_path / "x", tree, params, NAMES)
        config = config_of(folder)
        assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (4, 12, True)
        tensors, _ = read_safetensors(folder / "adapter_model.safetensors")
        a, b = (tensors[f"{PREFIX}out.lora_{side}.weight"] for side in "AB")
        expected = params["out"]["kernel"] + 3 * (b @ a).T
        tolerance = 1e-5 if residual is None else 2e-2
        np.testing.assert_allclose(merged(tree, "out", "kernel"), expected, rtol=0, atol=tolerance)

    def test_a_target_that_ends_another_name(self, params, tmp_path):
        names = NameMap((NameRule("out", "head"), NameRule("heads", "tail.head", inputs=2)))
        folder = save_peft(tmp_path / "x", adapt(params, {"out/kernel": sj.lora(2)}), params, names)
        assert config_of(folder)["target_modules"] == "head"
        folder = save_peft(tmp_path / "y", adapt(params, {"heads/kernel": sj.lora(2)}), params, names)
        assert config_of(folder)["target_modules"] == ["tail.head"]

    @pytest.mark.parametrize(("sizes", "setting"), [((4, 4), 4), ((8, 2), 6), ((8, 6), 7), ((2, 2), 2)], ids=str)
    def test_one_block_size_for_all(self, params, tmp_path, sizes, setting):
        """PEFT moves it to the nearest divisor of every input size, here 8 and 6."""
        if sizes == (4, 4):
            rules = {"out/kernel": sj.oft(4)}
        else:
            rules = {"out/kernel": sj.oft(sizes[0]), "heads/kernel": sj.oft(sizes[1])}
        if sizes == (8, 2):
            with pytest.raises(AdapterFileError, match="'heads/kernel' has block size 2 and 'out/kernel' has 8"):
                save_peft(tmp_path / "x", adapt(params, rules), params, NAMES)
            return
        folder = save_peft(tmp_path / "x", adapt(params, rules), params, NAMES)
        assert config_of(folder)["oft_block_size"] == setting


BASE = {"out/kernel": sj.lora(2)}


class TestNothingIsWritten:
    @pytest.mark.parametrize(
        ("rules", "match"),
        [
            ({"unnamed/kernel": sj.lora(2)}, r"no name for(.|\n)*'unnamed/kernel'; nearest"),
            ({**BASE, "unnamed/kernel": sj.full()}, r"no name for(.|\n)*'unnamed/kernel'"),
            ({"out/kernel": sj.svfit(2)}, r"out/kernel: is a .* made by 'svfit', which has no form"),
            ({"out/kernel": sj.qpissa(2)}, "out/kernel: stands on a NF4"),
            ({"out/kernel": sj.full()}, "no adapter at all"),
            ({**BASE, "heads/kernel": sj.oft(2)}, "LORA at out/kernel and OFT at heads/kernel|OFT at heads"),
            ({**BASE, "heads/kernel": sj.dora(sj.lora(2))}, "one setting for all"),
            ({**BASE, "heads/kernel": sj.lora(2, dropout=0.5)}, "has dropout"),
            ({"out/kernel": sj.randlora(2)}, "out/kernel: pairs its bases as the paper does"),
            ({"out/kernel": sj.randlora(2, pairing="peft", extra_basis=True)}, "out/kernel: has 4 bases of rank 2"),
            (
                {"conv/kernel": sj.randlora(2, pairing="peft")},
                r"conv/kernel: is a module of .*a RandomBases does to linear modules only",
            ),
            (
                {"out/kernel": sj.randlora(2, pairing="peft"), "heads/kernel": sj.randlora(2, pairing="peft", seed=1)},
                "out/kernel: reads other bases than heads/kernel",
            ),
            ({"out/kernel": sj.oft(4, magnitude=True)}, "out/kernel: has a factor for every output"),
            ({"out/kernel": sj.oft(4, terms=3)}, "out/kernel: has terms=3"),
            (
                {"conv/kernel": sj.oft(4)},
                r"conv/kernel: is a module of .*what a Rotated does to linear",
            ),
            ({"tied/embedding": sj.lora(2)}, "tied/embedding: the model reads this array in several places"),
            ({**BASE, "tied/embedding": sj.full()}, "tied/embedding: the model reads this array in several places"),
        ],
        ids=lambda value: value if isinstance(value, str) else None,
    )
    def test_for_trees_that_peft_cannot_hold(self, params, tmp_path, rules, match):
        tree = adapt(params, rules)
        with pytest.raises(AdapterFileError, match=match) as error:
            save_peft(tmp_path / "x", tree, params, NAMES)
        assert "nothing was written" in str(error.value)
        assert not list(tmp_path.iterdir())

    def refused(self, tree, params, folder, match, names=NAMES):
        with pytest.raises(AdapterFileError, match=match):
            save_peft(folder, tree, params, names)
        assert not list(folder.parent.iterdir())

    def test_for_other_parameters(self, params, tmp_path):
        for rules in (
            BASE,
            {"out/kernel": sj.pissa(2)},
            {"out/kernel": sj.oft(4)},
            {"out/kernel": sj.dora(sj.lora(2))},
        ):
            tree = adapt(params, rules)
            other = {**params, "out": {**params["out"], "kernel": params["out"]["kernel"] + 0.01}}
            self.refused(tree, other, tmp_path / "x", "out/kernel: (stands on another|its residual and its start)")

    def test_for_a_moved_plain_array(self, params, tmp_path):
        tree = adapt(params, BASE)
        tree["unnamed"]["kernel"] = tree["unnamed"]["kernel"] + 1
        self.refused(tree, params, tmp_path / "x", "'unnamed/kernel' is no stand-in weight and differs")

    def test_for_another_tree(self, params, tmp_path):
        tree = adapt(params, BASE)
        del tree["unnamed"]
        self.refused(tree, params, tmp_path / "x", r"not of one tree(.|\n)*'unnamed/kernel'")

    def test_for_half_a_tree(self, params, tmp_path):
        for rules in (
            BASE,
            {"out/kernel": sj.dora(sj.lora(2))},
            {"out/kernel": sj.oft(4)},
            {**BASE, "out/bias": sj.full()},
        ):
            trainable, frozen = sj.partition(adapt(params, rules))
            self.refused(trainable, params, tmp_path / "x", "not of one tree")
            self.refused(frozen, params, tmp_path / "x", r"combine\(\) the two trees of partition")

    def test_for_another_reading_of_the_axes(self, params, tmp_path):
        names = NameMap((NameRule("heads", "net.heads", inputs=1),))
        self.refused(
            adapt(params, {"heads/kernel": sj.lora(2)}),
            params,
            tmp_path / "x",
            r"heads/kernel: was adapted with .*in=\(0, 1\)",
            names,
        )

    def test_for_a_module_both_adapted_and_saved(self, params, tmp_path):
        tree = adapt(params, {**BASE, "heads/kernel": sj.lora(2), "heads/bias": sj.full()})
        names = NameMap(
            (
                NameRule("out", "net.out"),
                NameRule("heads", "net.heads", inputs=2, leaves=(("kernel", "weight"), ("bias", "extra"))),
            )
        )
        self.refused(tree, params, tmp_path / "x", "heads/kernel: is a LowRank in a module of which another", names)

    def test_for_saved_names_that_end_others(self, params, tmp_path):
        tree = adapt(params, {**BASE, "heads/*": sj.full()})
        names = NameMap((NameRule("out", "fathead"), NameRule("heads", "head", inputs=2)))
        self.refused(tree, params, tmp_path / "x", "'head' is found in 'fathead' too", names)


class TestFolders:
    def test_an_adapter_is_replaced_on_demand_only(self, params, tmp_path):
        one, other = adapt(params, BASE), adapt(params, {"heads/kernel": sj.lora(2)})
        folder = save_peft(tmp_path / "x", one, params, NAMES)
        before = config_of(folder)
        with pytest.raises(AdapterFileError, match="overwrite=True"):
            save_peft(folder, other, params, NAMES)
        assert config_of(folder) == before
        save_peft(folder, other, params, NAMES, overwrite=True)
        assert config_of(folder)["target_modules"] == ["net.heads"]
        assert [file.name for file in tmp_path.iterdir()] == ["x"]

    def test_an_empty_folder_is_filled(self, params, tmp_path):
        (tmp_path / "x").mkdir()
        assert len(list(save_peft(tmp_path / "x", adapt(params, BASE), params, NAMES).iterdir())) == 2

    def test_a_folder_of_other_things_is_left_alone(self, params, tmp_path):
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "thesis.tex").write_text("years of work")
        with pytest.raises(AdapterFileError, match=r"holds 'thesis.tex' too"):
            save_peft(tmp_path / "x", adapt(params, BASE), params, NAMES, overwrite=True)
        assert (tmp_path / "x" / "thesis.tex").read_text() == "years of work"

    def test_files_links_and_missing_parents(self, params, tmp_path):
        tree = adapt(params, BASE)
        (tmp_path / "file").write_text("")
        (tmp_path / "link").symlink_to(tmp_path)
        for name, match in (
            ("file", "is no folder"),
            ("link", "is no folder"),
            ("a/b", "parent folder does not exist"),
        ):
            with pytest.raises(AdapterFileError, match=match):
                save_peft(tmp_path / name, tree, params, NAMES, overwrite=True)

    def test_a_failure_leaves_what_was_there(self, params, tmp_path, monkeypatch):
        folder = save_peft(tmp_path / "x", adapt(params, BASE), params, NAMES)
        before = {file.name: file.read_bytes() for file in folder.iterdir()}
        replace = os.replace

        def failing(source, target):
            if os.fspath(source).endswith(".tmp") and os.path.isdir(source):
                raise OSError("disk full")
            return replace(source, target)

        monkeypatch.setattr(os, "replace", failing)
        with pytest.raises(AdapterFileError, match="disk full"):
            save_peft(folder, adapt(params, {"heads/kernel": sj.lora(2)}), params, NAMES, overwrite=True)
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
        assert [file.name for file in tmp_path.iterdir()] == ["x"]

    def test_a_part_without_the_weight_that_owns_the_bases(self, params, tmp_path):
        tree = adapt(params, {"**/{out,fc,heads}/kernel": sj.randlora(2, pairing="peft")})
        whole = {**params, "out": tree["out"], "heads": tree["heads"], "layers": tree["layers"]}
        owner = next(path for path, w in sj.core.leaves_with_paths(whole) if getattr(w, "basis_a", None) is not None)
        left = {**whole, owner.split("/")[0]: params[owner.split("/")[0]]}
        with pytest.raises(AdapterFileError, match=f"nothing was written: .* stored as 'basis_a' at {owner}"):
            save_peft(tmp_path / "x", left, params, NAMES)
        assert not (tmp_path / "x").exists()


def test_an_array_of_a_module_with_others_in_it_is_refused():
    params = {"embeddings": {"cls": jnp.ones((1, 1, 4)), "patch": {"kernel": jnp.ones((2, 2, 3, 4))}}}
    names = NameMap(
        (
            NameRule("embeddings/patch", "embeddings.patch", "conv"),
            NameRule("embeddings", "embeddings", "array", leaves=(("cls", "cls_token"),)),
        )
    )
    rules = {"**/patch/kernel": sj.lora(2), "**/cls": sj.full()}
    roles = {"embeddings/patch/kernel": sj.Role.conv(4)}
    adapted = sj.adapt(params, rules, key=jax.random.key(0), roles=roles)
    with pytest.raises(AdapterFileError, match=r"embeddings/cls: in PyTorch.*save whole"):
        sj.save_peft("unwritten", adapted, params, names)
