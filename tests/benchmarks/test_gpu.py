"""What `gpu` measures at tiny sizes on a CPU, and what becomes of rows that fail or find no time."""

import functools
import json
import math
import sys
import time

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

import subspace_jax as sj
from benchmarks import _gpu_peft, _gpu_step
from benchmarks.__main__ import main
from benchmarks._gpu_processes import NO_TIME, Collected, Pair, collect, read_rows
from benchmarks._gpu_rows import AbsentError, Task, print_rows, timed, timing
from benchmarks._products import product_flops
from benchmarks.gpu import OURS, PEFT, VARIANTS, Config, charts, pairs, result, run, tables
from experiments.runner import read_json

# Of the tiny shape: q, k, v, output, gate, up, down of two layers.
KERNELS = 2 * [(64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64)]
RANK = 4


def trained(kind):
    """Values that a method trains, by its paper's count; PEFT's RandLoRA scales ranks and the smaller side."""
    if kind == "full":
        return sum(i * o for i, o in KERNELS) + 97 * 64 + 5 * 64
    return sum(
        {
            "lora": RANK * (i + o),
            "dora": RANK * (i + o) + o,
            "oft": i // 32 * (32 * 31 // 2),
            "randlora": min(i, o) // RANK * (RANK + min(i, o)),
        }[kind]
        for i, o in KERNELS
    )


def products(kind):
    """Operations of 32 tokens' products in the tiny step, whose layers are computed twice but for the last product."""
    each = 2 * 32
    kernels, last, head = sum(i * o for i, o in KERNELS), 2 * 128 * 64, 97 * 64
    attention = 2 * 2 * 16 * 64  # scores and their use, of 16 tokens in two layers
    if kind == "full":
        return each * (4 * kernels - last + 4 * attention + 3 * head)
    factors, last_out = sum(RANK * (i + o) for i, o in KERNELS), 2 * RANK * 64
    # Below the first layer's projections nothing learns: no gradient of their inputs, through kernels or factors.
    first = sum(i * o for i, o in KERNELS[:3]) + 3 * 64 * RANK
    return each * (3 * kernels - last + 4 * factors - last_out + 4 * attention + 2 * head - first)


def test_products_of_loops_and_branches():
    matrix = jnp.ones((8, 8))
    product = 2.0 * 8**3

    def looped(x):
        x, _ = jax.lax.scan(lambda c, _: (c @ matrix, None), x, length=5)
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ matrix @ matrix, lambda x: x @ matrix, x)

    assert product_flops(jax.make_jaxpr(jax.jit(looped))(matrix)) == 6 * product
    assert product_flops(jax.make_jaxpr(jax.vmap(jnp.matmul))(jnp.ones((3, 2, 4)), jnp.ones((3, 4, 7)))) == 336


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    variants = "variants=full,lora,lora + flash attention"
    settings = ["shapes=tiny", f"libraries={OURS}", variants, f"rank={RANK}", "seconds=0.05"]
    main(["run", "gpu", "--out", str(out), "--set", *settings])
    (file,) = out.glob("gpu-*.json")
    assert "A step of tiny" in (out / "README.md").read_text()
    assert file.with_suffix(".png").exists()
    return read_json(file)


def test_the_command_measures_a_tiny_step(results):
    full, lora = results["rows"]
    assert (full["variant"], lora["variant"]) == ("full", "lora")
    assert [row["trainable_values"] for row in (full, lora)] == [trained("full"), trained("lora")]
    for row in (full, lora):
        assert row["tokens_per_s"] * row["step_ms"] == pytest.approx(2 * 16 * 1e3)
        assert row["steps"] >= 5
        first, last = row["losses"]
        assert last < first
        assert first == pytest.approx(math.log(97), abs=0.1)
        assert row["device"] == jax.devices()[0].device_kind
    # Weights and two moments in bfloat16, and the frozen base beside LoRA's.
    assert full["bytes"] > 3 * 2 * trained("full")
    assert lora["bytes"] > 2 * trained("full")
    assert [row["flops"] for row in (full, lora)] == [products("full"), products("lora")]
    assert lora["of_full"] == lora["step_ms"] / full["step_ms"]
    assert results["versions"]["jax"] == jax.__version__


def test_flash_attention_is_left_out_by_name_without_a_gpu(results):
    if jax.default_backend() == "gpu":
        pytest.skip("there is a GPU")
    assert [row["variant"] for row in results["left_out"]] == ["lora + flash attention"]
    assert "tiny, subspace_jax: left out, its attention needs a GPU: lora + flash attention." in results["notes"]


def test_flash_attention_is_cudnns(monkeypatch):
    asked, plain = [], jax.nn.dot_product_attention

    def answered(*arrays, implementation=None, **options):
        asked.append((implementation, options["is_causal"]))
        return plain(*arrays, **options)

    model = tiny_model()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", answered)
    row = _gpu_step.measure(lambda: model, "lora + flash attention", Task("tiny", (), RANK, 0.0))
    assert row["flops"] == products("lora")
    assert set(asked) == {("cudnn", True)}


def test_joined_products_are_an_option_of_the_compiler(monkeypatch):
    asked, plain = [], jax.stages.Lowered.compile

    def compiled(self, options=None):
        asked.append(options)
        return plain(self, options)

    model = tiny_model()
    with pytest.raises(AbsentError, match="only the compiler for GPUs"):
        _gpu_step.measure(lambda: model, "lora + joined products", Task("tiny", (), RANK, 0.0))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.stages.Lowered, "compile", compiled)
    for variant in ("lora + joined products", "lora"):
        assert _gpu_step.measure(lambda: model, variant, Task("tiny", (), RANK, 0.0))["flops"] == products("lora")
    assert asked == [{"xla_gpu_dot_merger_threshold_mb": 1024}, None]


@pytest.mark.usefixtures("quick_collections")
def test_a_failing_variant_is_a_row(capsys):
    _gpu_step.main(Task("tiny", ("pissa",), 1000, 0.0).text())
    row = json.loads(capsys.readouterr().out)
    assert row["variant"] == "pissa"
    assert "RankError" in row["error"]


@pytest.mark.usefixtures("quick_collections")
def test_others_go_on_behind_a_failing_one(capsys):
    def measure(variant):
        if variant == "a":
            raise ValueError("too large")
        if variant == "b":
            raise AbsentError("no GPU")
        return {"step_ms": 1.0}

    print_rows(Task("tiny", ("a", "b", "c"), 4, 0.0), measure)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows == [
        {"variant": "a", "error": "ValueError: too large"},
        {"variant": "b", "absent": "no GPU"},
        {"variant": "c", "step_ms": 1.0},
    ]


def test_steps_are_warmed_up_and_waited_for():
    calls = []
    times = timed(lambda: calls.append("step"), lambda: calls.append("wait"), 0.0)
    assert len(times) == 5
    assert calls == ["step"] * 3 + ["wait"] + ["step", "wait"] * 5
    found = timing([0.5, 0.25, 1.0], 64)
    assert found == {"step_ms": 500.0, "spread_ms": 750.0, "steps": 3, "tokens_per_s": 128.0}


PROGRAM = """
import json, subprocess, sys, time
print("a library says something")
print(json.dumps({"variant": "a", "step_ms": 1.0}), flush=True)
{ending}
"""


def rows_of(ending, seconds):
    return read_rows([sys.executable, "-S", "-c", PROGRAM.replace("{ending}", ending)], seconds, {})


def test_rows_of_a_process_that_ends():
    first = {"variant": "a", "step_ms": 1.0}
    assert rows_of("", 20) == ([first], None)
    rows, ending = rows_of("print('out of memory', file=sys.stderr); sys.exit(7)", 20)
    assert (rows, ending) == ([first], "the process ended with 7: out of memory")


def test_a_process_without_time_ends_with_its_children():
    child = "subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)']); time.sleep(60)"
    start = time.monotonic()
    rows, ending = rows_of(child, 1.5)
    assert [row["variant"] for row in rows] == ["a"]
    assert ending == NO_TIME
    assert time.monotonic() - start < 20  # the child holds the pipe open as long as it lives


class Machine:
    """Processes that take some seconds a row, and a clock."""

    def __init__(self, seconds, dies_at=()):
        self.now, self.seconds, self.dies_at, self.starts = 0.0, seconds, dies_at, []

    def start(self, pair, variants, seconds):
        self.starts.append((pair.shape, tuple(variants)))
        rows, end = [], self.now + seconds
        for variant in variants:
            if variant in self.dies_at:
                return rows, "the process ended with -6: out of memory"
            if self.now + self.seconds > end:
                self.now = end
                return rows, NO_TIME
            self.now += self.seconds
            rows.append({"variant": variant, "step_ms": 1.0})
        return rows, None

    def collect(self, pairs, limit):
        return collect(pairs, limit, self.start, lambda: self.now)


ONE, OTHER = Pair("1B-8x1024", OURS, ("a", "b", "c", "d")), Pair("tiny", OURS, ("a", "b"))


def test_the_limit_leaves_out_rows_by_name():
    machine = Machine(seconds=20)
    found = machine.collect([ONE, OTHER], 90)
    # Four of six shares, and what is left of the other two.
    assert [(row["shape"], row["variant"]) for row in found.rows] == [
        *(("1B-8x1024", v) for v in "abc"),
        ("tiny", "a"),
    ]
    assert machine.now <= 90
    left = [(row["shape"], row["variant"], row["reason"]) for row in found.left_out]
    assert left == [("1B-8x1024", "d", NO_TIME), ("tiny", "b", NO_TIME)]
    with pytest.raises(
        SystemExit, match=r"nothing was measured.\ntiny, subspace_jax: left out, no time was left: a; b"
    ):
        result(machine.collect([OTHER], 10), 4)


def test_time_that_is_left_over_goes_to_those_that_had_too_little():
    class Short(Machine):
        def start(self, pair, variants, seconds):
            self.seconds = 1 if pair is OTHER else 20
            return super().start(pair, variants, seconds)

    machine = Short(seconds=20)
    found = machine.collect([ONE, OTHER], 99)
    assert machine.starts == [("1B-8x1024", tuple("abcd")), ("tiny", ("a", "b")), ("1B-8x1024", ("d",))]
    assert len(found.rows) == 6
    assert found.left_out == []


def test_a_process_that_dies_takes_one_row_with_it():
    machine = Machine(seconds=1, dies_at=("b",))
    found = machine.collect([ONE], 100)
    assert machine.starts == [("1B-8x1024", tuple("abcd")), ("1B-8x1024", ("c", "d"))]
    assert {row["variant"]: row.get("error") for row in found.rows} == {
        **dict.fromkeys("acd"),
        "b": "the process ended with -6: out of memory",
    }


def figures(variant, library, milliseconds):
    return {
        **{"shape": "1B-8x1024", "library": library, "variant": variant, "step_ms": milliseconds, "spread_ms": 1.0},
        **{"tokens_per_s": 1e6, "bytes": 2**30, "flops": 2e11 * milliseconds, "trainable_values": 7},
        **{"losses": [2.0, 1.0], "device": "a card", "versions": {library: "1.0"}},
    }


def test_tables_have_ratios_beside_the_goals():
    rows = [
        figures("full", OURS, 100.0),
        figures("lora", OURS, 45.0),
        figures("full + flash attention", OURS, 80.0),
        figures("lora + flash attention", OURS, 40.0),
        {"shape": "1B-8x1024", "library": OURS, "variant": "dora", "error": "MemoryError: 90\nGiB"},
        figures("pissa", OURS, 50.0),
        figures("full", PEFT, 120.0),
        figures("lora", PEFT, 60.0),
        figures("lora + torch.compile", PEFT, 55.0),
    ]
    found = result(Collected(rows), 16)
    assert found["devices"] == {OURS: "a card", PEFT: "a card"}
    assert "1B 8x1024, subspace_jax: dora failed: MemoryError: 90 GiB" in found["notes"]
    (title, times), (_, sizes) = tables(found)
    assert title == "A step of 1B 8x1024"
    head = ["variant", "ms", "spread", "of full", "at most 0.45"]
    assert times == [
        [*head, "PEFT's ms", "spread", "of PEFT's", "at most 0.80"],
        ["full", "100.00", "1.00", "1.00", "", "120.00", "1.00", "0.83", "no"],
        ["lora", "45.00", "1.00", "0.45", "yes", "60.00", "1.00", "0.75", "yes"],
        ["full + flash attention", "80.00", "1.00", "1.00", "", "", "", "0.67", "yes"],
        ["lora + flash attention", "40.00", "1.00", "0.50", "no", "", "", "0.67", "yes"],
        ["dora", "failed", "", "", "", "", "", "", ""],
        ["pissa", "50.00", "1.00", "0.50", "", "", "", "0.83", "no"],
        ["lora + torch.compile", "", "", "", "", "55.00", "1.00", "", ""],
    ]
    assert all(len(row) == len(sizes[0]) for row in sizes)
    assert sizes[2] == ["lora", "7", "1,000,000", "1.0 GiB", "200.0", "0.450", "1,000,000", "1.0 GiB"]
    (chart,) = charts(found)
    assert chart.bars["lora"] == {OURS: 45.0, PEFT: 60.0}


def test_all_that_is_asked_for_is_measured_once():
    assert [(pair.shape, pair.library) for pair in pairs(Config())][:3] == [
        ("1B-8x1024", OURS),
        ("1B-8x1024", PEFT),
        ("160M-16x128", OURS),
    ]
    for library, methods in ((OURS, _gpu_step.METHODS), (PEFT, _gpu_peft.METHODS)):
        assert {variant.split(" + ")[0] for variant in VARIANTS[library]} == set(methods)
    with pytest.raises(SystemExit, match="shapes=9B: choose from 1B-8x1024; 160M-16x128"):
        pairs(Config(shapes=("9B",)))
    with pytest.raises(SystemExit, match="variants=sgd: choose from full; lora"):
        pairs(Config(variants=("full", "sgd")))


@pytest.mark.parametrize("kind", ["dora", "oft", "randlora"])
def test_methods_train_what_peft_trains(kind):
    model, method = tiny_model(), _gpu_step.METHODS[kind]
    assert method is not None
    rules = {_gpu_step.KERNELS: method(RANK)}
    adapt = functools.partial(sj.adapt, rules=rules, key=jax.random.key(0), roles=model.roles)
    learned, _ = sj.partition(jax.eval_shape(adapt, model.params))
    assert sum(leaf.size for leaf in jax.tree.leaves(learned)) == trained(kind)


@functools.cache
def tiny_model():
    return _gpu_step.Model("tiny")


@pytest.mark.interop
def test_peft_takes_steps_of_the_same_sizes():
    for name in _gpu_peft.NEEDS:
        pytest.importorskip(name)
    variants = ("full", "dora", "oft", "randlora")
    config = Config(shapes=("tiny",), libraries=(PEFT,), variants=variants, rank=RANK, seconds=0.0)
    rows = run(config, Console(quiet=True))["rows"]
    assert [row["variant"] for row in rows] == list(variants)
    for row in rows:
        assert row["trainable_values"] == trained(row["variant"])
        assert row["losses"][1] < row["losses"][0]
        assert row["losses"][0] == pytest.approx(math.log(97), abs=0.1)
