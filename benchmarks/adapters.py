"""One training step with every adapter of the catalogue, relative to LoRA's at equal budget, in one process."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax
from rich.console import Console

import subspace_jax as sj
from benchmarks import _arithmetic as arithmetic
from benchmarks._benchmark import Benchmark, Rows, number
from benchmarks._charts import Chart
from benchmarks._measure import Runner, interleaved, paired_ratio, step_cost
from benchmarks._models import Plain, StepConfig, cross_entropy, linen
from benchmarks._variants import Variant, of_tree
from experiments.runner import human_bytes
from subspace_jax.methods.continual.igsp import igsp
from subspace_jax.methods.low_rank.block_lora import block_lora
from subspace_jax.methods.low_rank.comp_lora import comp_lora
from subspace_jax.methods.low_rank.orthogonal_adaptation import orthogonal_adaptation
from subspace_jax.methods.low_rank.pego import pego, penalty

TARGETS = {
    "all": ("query", "key", "value", "out", "mlp_in", "mlp_out", "head"),
    "query and value": ("query", "value"),
}
S2FT = {"**/out/kernel": sj.s2ft(1 / 8, heads=8), "**/mlp_out/kernel": sj.s2ft(1 / 24)}
RATE = 1e-4
SARA = 1.7e-3  # about LoRA's number of entries of these kernels are smaller
PEGO_NOTE = "its penalty is in the loss; of ten products of outputs by outputs the compiler counts the loop's one"
# Seconds of training relative to LoRA's, of PEFT's own comparison of methods on a language model.
PUBLISHED_BY_PEFT = {"randlora": 1.51, "dora": 1.26, "osf": 2.8, "oft": 1.26}


@dataclasses.dataclass(frozen=True)
class Config(StepConfig):
    """Settings: those of `StepConfig`, and these. The rank is LoRA's; others train as many values if they can.

    Attributes:
      longer: tokens of longer sequences, for which operations are counted only; 0 leaves this out.
      targets: "all" kernels, or "query and value", which PEFT adapts by default.
      methods: names of the methods; all if empty.
      rounds: timed steps of each method, interleaved; 0 compiles only and allocates nothing.
    """

    longer: int = 512
    targets: tuple[str, ...] = ("all", "query and value")
    methods: tuple[str, ...] = ()
    rounds: int = 10


@dataclasses.dataclass(frozen=True)
class Arm:
    """One method as it is measured.

    Attributes:
      method: what adapts the kernels; None where `rules` says it.
      products: operations of its products with one kernel; None where this is not written down.
      optimizer: makes its optimizer of the adapted tree; Adam after a global-norm clip if None.
      statistics: name of what it starts from.
      rules: rules of its own, in place of `method` on the adapted kernels.
      of_statistics: makes such rules of the captured statistics and the roles.
      pattern: what of a layer the method takes.
      penalty: what the method adds to the loss, of the whole adapted tree.
      note: what a reader has to know.
    """

    method: sj.Method | None
    products: arithmetic.Products | None = None
    optimizer: Callable[[Any], optax.GradientTransformation] | None = None
    statistics: str = ""
    rules: Mapping[str, Any] | None = None
    of_statistics: Callable[[Any, Any], Mapping[Any, Any]] | None = None
    pattern: str = "kernel"
    penalty: Callable[[Any], jax.Array] | None = None
    note: str = ""


def arms(config: Config, trained: int, kernels: int) -> dict[str, Arm]:
    """Returns every method at about the budget of LoRA.

    Args:
      config: the settings.
      trained: values that LoRA trains.
      kernels: number of adapted kernels.
    """
    rank = config.rank
    square, share = round((trained / kernels) ** 0.5), trained // kernels
    blocked = 4 * rank // 3 // 2 * 2  # of two blocks, at as many values
    guarded = config.width // 8  # directions that Comp-LoRA keeps out of
    of_rank, of_width = arithmetic.lora(rank), arithmetic.diagonal(config.width)
    found = {
        "lora": Arm(sj.lora(rank), of_rank),
        "dora": Arm(sj.dora(sj.lora(rank)), arithmetic.dora(rank)),
        "pissa": Arm(sj.pissa(rank), of_rank),
        "corda": Arm(sj.corda(rank), of_rank, statistics="gram"),
        "matryoshka": Arm(sj.matryoshka(sj.lora(rank)), of_rank),
        "orthogonal_adaptation": Arm(orthogonal_adaptation(2 * rank, concept=0), arithmetic.output_factor(2 * rank)),
        "comp_lora": Arm(comp_lora(rank, protect=guarded), arithmetic.complement(rank, guarded)),
        "block_lora": Arm(block_lora(blocked, alpha=blocked**0.5), arithmetic.lora(blocked // 2)),
        "pego": Arm(pego(rank // 4), arithmetic.pego(rank // 4, 4), penalty=_pego, note=PEGO_NOTE),
        "flora": Arm(sj.flora(rank), arithmetic.tucker(rank)),
        "lora_xs": Arm(sj.methods.lora_sb.lora_xs(square), arithmetic.core(square)),
        "lora_sb": Arm(sj.lora_sb(square, learning_rate=1e-3), arithmetic.core(square), statistics="gradient"),
        "randlora": Arm(sj.randlora(32), arithmetic.random_bases(32)),
        "oft": Arm(sj.oft(32), arithmetic.rotation(32)),
        "soka": Arm(sj.soka(rank)),
        "loca": Arm(sj.loca(share), arithmetic.cosine, _alternating),
        "svfit": Arm(sj.svfit(config.width), of_width),
        "loldu": Arm(sj.loldu(), of_width),
        "lift": Arm(sj.lift(rank, filter_rank=8 * rank), arithmetic.full, lambda _: sj.methods.lift.lift_adam(RATE)),
        "sara": Arm(
            sj.methods.sara.sara(SARA),
            arithmetic.full,
            _sara,
            note="a singular value decomposition a step, which is not counted",
        ),
        "spt": Arm(
            None,
            statistics="squared_gradient",
            of_statistics=lambda stats, roles: _spt(stats, roles, config, trained),
            note="modules and entries where a batch of random tokens is sensitive",
        ),
        "mosa": Arm(
            None,
            rules={"**/mlp_out/*": sj.methods.mosa.mosa(max(1, trained // (2 * config.width * config.layers)))},
            note="an adapter after each MLP, whatever others adapt; one pass of merged parts, training takes two",
        ),
        "snell": Arm(
            sj.methods.snell.snell(rank, sparsity=0.9, dropout=0.0, drop_path=0.0),
            arithmetic.kernelized(rank),
            note="the sorting of magnitudes is no product",
        ),
        "snella": Arm(
            sj.methods.snella.snella(rank, sparsity=0.9, dropout=0.0, drop_path=0.0),
            arithmetic.kernelized(rank),
            lambda _: sj.methods.snella.with_importance(optax.adam(RATE)),
            note="the sorting of magnitudes is no product",
        ),
        "queryable_lora": Arm(
            sj.methods.queryable_lora.queryable_lora(rank, blocks=blocks(config.layers), head="**/query/kernel"),
            arithmetic.routed(rank, 8),
            note="the router is not among the products",
        ),
        "igsp": Arm(
            None,
            rules={"**/{mlp_in,mlp_out}/kernel": igsp(_expert(trained, config), tasks=1, candidates=2, reads="mlp_in")},
            note="two experts beside each MLP, whatever others adapt, of one task; without noise and dropout",
        ),
        "composable_sft": Arm(
            None,
            arithmetic.full,
            statistics="gradient",
            of_statistics=lambda stats, _: _composable(stats, trained),
            note="its second phase; entries of the largest gradients of a batch of random tokens",
        ),
        "s2ft": Arm(None, rules=S2FT, note="rows of the attention's and the MLP's outputs, whatever others adapt"),
        "ssf": Arm(sj.ssf(), arithmetic.elementwise, pattern="*", note="kernels and biases, norms left out"),
        "osf": Arm(sj.osf(0.5), optimizer=_osf, note="half of all singular triples learn, far more values than LoRA's"),
        "full": Arm(sj.full(), arithmetic.full, note="of the same kernels"),
    }
    unknown = sorted(set(config.methods) - set(found))
    if unknown:
        raise SystemExit(f"methods={','.join(unknown)}: choose from {', '.join(found)}.")
    return {name: arm for name, arm in found.items() if not config.methods or name in ("lora", *config.methods)}


def _expert(trained: int, config: Config) -> int:
    """Hidden values of each of two experts."""
    return max(1, trained // (4 * config.width * config.layers))


def blocks(layers: int) -> tuple[str, ...]:
    """Globs of the layers in the order in which they run, the model's head with the last of them."""
    return (*(f"layer_{i}/**" for i in range(layers - 1)), f"{{layer_{layers - 1},head}}/**")


def _alternating(tree: Any) -> optax.GradientTransformation:
    del tree
    return sj.methods.loca.alternating(optax.adam(RATE), optax.adam(RATE), cutoff_step=1000)


def _sara(tree: Any) -> optax.GradientTransformation:
    return sj.methods.sara.sara_adam(RATE, tree, threshold=SARA, reselect_after=1000)


def _spt(stats: Any, roles: Any, config: Config, trained: int) -> Mapping[Any, Any]:
    found = sj.methods.spt.allocate(stats, trained, roles=roles, rank=config.rank, step=20_000, most=10**9)
    return {found.paths: sj.methods.spt.spt(found)}


def _pego(tree: Any) -> jax.Array:
    return 1e-3 * penalty(tree)


def _composable(stats: Any, trained: int) -> Mapping[Any, Any]:
    sft = sj.methods.composable_sft
    found = sft.Selection(
        sj.weights.largest_of_all({p: abs(np.asarray(s.gradient)) for p, s in stats.items()}, trained)
    )
    return {found.paths: sft.composable_sft(found)}


def _osf(tree: Any) -> optax.GradientTransformation:
    return sj.methods.osf.projection(optax.adam(RATE), tree)


def variant(plain: Plain, name: str, arm: Arm, targets: tuple[str, ...], tokens: jax.Array) -> Variant:
    """Returns the model with one method on the kernels of `targets`."""
    rules = arm.rules or {f"**/{kernel}/{arm.pattern}": arm.method for kernel in targets}
    stats = None
    if arm.statistics:

        def loss(params: Any, tokens: jax.Array) -> jax.Array:
            return cross_entropy(plain.apply(params, tokens), tokens)

        select = [f"**/{kernel}/kernel" for kernel in targets]
        stats = sj.capture(loss, plain.params, [tokens], statistics=arm.statistics, select=select)  # pyright: ignore[reportArgumentType]
    roles = sj.roles(plain.apply, plain.params, tokens)
    if arm.of_statistics:
        rules = arm.of_statistics(stats, roles)
    adapted = sj.adapt(plain.params, rules, key=jax.random.key(1), stats=stats, roles=roles)
    own = arm.optimizer(adapted) if arm.optimizer else None
    return of_tree(plain, adapted, name, "lora", note=arm.note, own=own, penalty=arm.penalty)


def run(config: Config, console: Console) -> dict[str, Any]:
    """Measures every method on each set of kernels."""
    unknown = sorted(set(config.targets) - set(TARGETS))
    if unknown:
        raise SystemExit(f"targets={','.join(unknown)}: choose from {', '.join(TARGETS)}.")
    plain = linen(config.model(), config.tokens())
    found = {targets: _measure(config, plain, TARGETS[targets], console) for targets in config.targets}
    notes = [
        "Relative to LoRA on the same kernels, in the same rounds. `products`: the operations of the matrix products "
        "that the method cannot do without (`benchmarks/_arithmetic.py`), of LoRA's; the compiler counts everything "
        "else as well. `seconds, PEFT` are the training times that PEFT's comparison of methods publishes, with its "
        "default kernels, query and value. Times are medians over rounds in which all methods ran one after the other.",
        *dict.fromkeys(
            f"{n}: {one['note']}." for measured in found.values() for n, one in measured.items() if one["note"]
        ),
    ]
    return {"measured": found, "order": list(config.targets), "notes": notes}


def _measure(config: Config, plain: Plain, targets: tuple[str, ...], console: Console) -> dict[str, Any]:
    tokens = config.tokens()
    kernels = len(targets) * config.layers - (config.layers - 1) * ("head" in targets)
    first = variant(plain, "lora", Arm(sj.lora(config.rank)), targets, tokens)
    measured: dict[str, Any] = {}
    runners: dict[str, Runner] = {}
    for name, arm in arms(config, first.trainable_values, kernels).items():
        console.print(f"  {name}")
        one = first if name == "lora" else variant(plain, name, arm, targets, tokens)
        cost, _ = step_cost(one, tokens)
        measured[name] = {
            "flops": cost.flops,
            "products": _products(config, arm, targets, config.length),
            "temporary_bytes": cost.temporary_bytes,
            "trainable_values": one.trainable_values,
            "note": arm.note,
        }
        if config.longer:
            measured[name]["longer_flops"] = step_cost(one, config.tokens(config.longer))[0].flops
        if config.rounds:
            runners[name] = Runner(one, tokens)
    if runners:
        console.print(f"  {config.rounds} rounds of {len(runners)} methods")
        interleaved(list(runners.values()), config.rounds)
    for name, runner in runners.items():
        measured[name]["seconds"] = runner.seconds
        measured[name]["losses"] = [runner.losses[0], runner.losses[-1]]
        measured[name]["seconds_ratio"] = paired_ratio(runner.seconds, runners["lora"].seconds)
    return measured


def _products(config: Config, arm: Arm, targets: tuple[str, ...], length: int) -> float | None:
    if arm.products is None:
        return None
    sizes = {name: getattr(config, name) for name in ("width", "mlp_width", "layers", "vocabulary")}
    return arithmetic.transformer(sizes, config.sequences * length, length, arm.products, lambda name: name in targets)


def tables(results: Mapping[str, Any]) -> list[tuple[str, Rows]]:
    """One table for each set of kernels."""
    return [(f"{targets} kernels", _rows(results["measured"][targets])) for targets in results["order"]]


def _rows(measured: Mapping[str, Any]) -> Rows:
    header = [
        "method",
        "trained",
        "operations",
        "products",
        "longer sequences",
        "step time",
        "seconds, PEFT",
        "temporaries",
    ]
    rows, lora = [header], measured["lora"]
    for name, one in sorted(measured.items(), key=lambda item: item[1]["flops"]):
        rows.append(
            [
                name,
                f"{one['trainable_values']:,}",
                f"{one['flops'] / lora['flops']:.2f}",
                f"{one['products'] / lora['products']:.2f}" if one["products"] else "",
                f"{one['longer_flops'] / lora['longer_flops']:.2f}" if "longer_flops" in one else "",
                number(one.get("seconds_ratio"), absent=""),
                number(PUBLISHED_BY_PEFT.get(name), absent=""),
                human_bytes(one["temporary_bytes"]),
            ]
        )
    return rows


def charts(results: Mapping[str, Any]) -> list[Chart]:
    """Operations and time of every method, one chart for each set of kernels."""
    found = []
    for targets in results["order"]:
        measured = results["measured"][targets]
        lora, bars = measured["lora"], {}
        for name, one in sorted(measured.items(), key=lambda item: item[1]["flops"]):
            bars[name] = {"operations": one["flops"] / lora["flops"]}
            if "seconds_ratio" in one:
                bars[name]["step time"] = one["seconds_ratio"]
            if name in PUBLISHED_BY_PEFT:
                bars[name]["seconds, published by PEFT"] = PUBLISHED_BY_PEFT[name]
        found.append(Chart(f"{targets} kernels adapted", "relative to LoRA", bars, reference=1.0))
    return found


BENCHMARK = Benchmark(
    name="adapters",
    claim="What a training step costs with 30 adapters of the catalogue, relative to LoRA at equal budget.",
    config=Config,
    run=run,
    tables=tables,
    charts=charts,
)
