"""What `memory` counts, on tiny models, and how it searches a depth."""

import dataclasses
import functools

import pytest
from rich.console import Console

from benchmarks import memory
from benchmarks.memory import Compiler, Config, deepest, methods, run, tables

CONFIG = Config(vocabulary=64, length=16, rank=4, optimizer_rank=4, shapes=("tiny", "small"), compared="tiny")
NAMES = ("full", "dct_adam", "lift", "lora", "qpissa")


@pytest.fixture(scope="module", autouse=True)
def shapes():
    """Tiny shapes, and each program compiled once: that takes a second or two, whoever asks for it."""
    measure = Compiler._measure

    @functools.cache
    def measured(config, *program):
        return measure(compiler_of(config), *program)

    def remembered(self, *program):
        return measured(dataclasses.replace(self.config, methods=(), budgets=(), shapes=()), *program)

    compiler_of = functools.cache(Compiler)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "SHAPES", (("tiny", 64, 4, 128, 2), ("small", 128, 4, 256, 3)))
        patch.setattr(Compiler, "_measure", remembered)
        yield


@pytest.fixture(scope="module")
def compiler():
    return Compiler(CONFIG)


def matrices(width, mlp_width):
    return 4 * width**2 + 3 * width * mlp_width


def test_arguments_are_what_the_method_keeps(compiler):
    held = {name: compiler.measure(name, "tiny", 2) for name in NAMES}
    kernels, count = 2 * matrices(64, 128), held["full"]["parameters"]
    assert count == kernels + 2 * 64 * 64 + 5 * 64
    assert all(values["parameters"] == count for values in held.values())
    full, lora, lift, dct, qpissa = (held[n] for n in ("full", "lora", "lift", "dct_adam", "qpissa"))
    # Weights and two moments in float32; the count of Adam.
    assert (full["trainable_bytes"], full["optimizer_bytes"], full["frozen_bytes"]) == (4 * count, 8 * count + 4, 0)
    # Both sides of every matrix, rank 4.
    factors = 2 * 4 * (4 * 2 * 64 + 3 * (64 + 128))
    assert lora["trainable_bytes"] == 4 * factors
    assert lora["frozen_bytes"] == 2 * count + 7 * 4  # and a scale for each of seven stacks of kernels
    assert lift["trainable_values"] == factors
    # Coordinates of rank 4 and an index each, for all matrices but the embedding's table of 64 x 64 as well.
    assert dct["trainable_bytes"] == 4 * count
    assert dct["optimizer_bytes"] < 0.2 * full["optimizer_bytes"]
    assert qpissa["frozen_bytes"] < 0.6 * lora["frozen_bytes"]
    for values in held.values():
        parts = sum(values[f"{key}_bytes"] for key in ("frozen", "trainable", "optimizer"))
        assert 0 <= values["argument_bytes"] - parts <= 16 * 4 + 64  # beside them: tokens, step and key
        assert values["bytes"] == values["argument_bytes"] + values["temporary_bytes"]
    # Gradients of all stacked kernels are there at once.
    assert full["temporary_bytes"] > 4 * kernels > lora["temporary_bytes"] - qpissa["temporary_bytes"]


@pytest.mark.parametrize("budget", [0, 9, 10, 109, 110, 111, 1234])
@pytest.mark.parametrize("bend", [0, 3, -2])
def test_the_depth_is_the_largest_that_fits(budget, bend):
    def held(layers):
        return 10 + 5 * layers + bend * max(0, layers - 25)  # a second slope from somewhere on

    found = deepest(held, budget, 4)
    assert found == max((n for n in range(1, 500) if held(n) <= budget), default=0)


@pytest.fixture(scope="module")
def budget(compiler):
    """Bytes for five layers of the small shape with LoRA; whole matrices fit in the tiny one."""
    return compiler.bytes("lora", "small", 5) + 1


def test_the_largest_model_fits_and_one_layer_more_does_not(compiler, budget):
    config = dataclasses.replace(CONFIG, methods=("lora", "full"), budgets=(budget,))
    # Budgets are in GiB; here in bytes.
    found = [memory.largest(compiler, method, config.shapes, budget) for method in config.methods]
    lora, full = found
    assert (lora["width_of"], lora["layers"]) == ("small", 5)
    assert lora["bytes"] <= budget < lora["one_more_bytes"]
    assert full["layers"] == 0 or full["bytes"] <= budget < full["one_more_bytes"]
    assert full.get("parameters", 0) < lora["parameters"]


def test_unknown_names_are_refused():
    with pytest.raises(SystemExit, match="methods=sgd; choose from full"):
        run(dataclasses.replace(CONFIG, methods=("sgd",)), Console(quiet=True))
    with pytest.raises(SystemExit, match="shapes=9B; choose from tiny"):
        memory.shape("9B")
    assert set(Config().methods) <= set(methods(Config()))


def test_tables_have_a_cell_for_every_budget(monkeypatch, budget):
    config = dataclasses.replace(CONFIG, methods=("full",), budgets=(1,), shapes=("tiny",))
    monkeypatch.setattr(memory, "GIBIBYTE", budget)
    results = run(config, Console(quiet=True))
    (_, most), (title, rows) = tables(results)
    assert most[0] == ["method", "1 GiB"]
    assert most[1][1].endswith(f": 64 x {results['largest'][0]['layers']}")
    assert title == "Bytes of a step of tiny"
    assert rows[1][0] == "full"
