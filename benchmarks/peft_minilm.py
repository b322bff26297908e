"""A step of a pretrained MiniLM here and in PyTorch PEFT, method by method: same weights, batch and loss."""

from __future__ import annotations

import abc
import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

import subspace_jax as sj
from benchmarks._benchmark import Benchmark, Rows, number
from benchmarks._charts import Chart
from benchmarks._measure import interleaved, paired_ratio
from subspace_jax.assets import find_file
from subspace_jax.models import load_minilm, mean_pool

KERNELS = "encoder/**/kernel"
LEARNING_RATE = 1e-4


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
      sequences: sequences in the batch.
      length: tokens in a sequence.
      rank: of LoRA and DoRA, on all kernels of the encoder.
      methods: those of METHODS that are measured; all if empty.
      rounds: timed steps of each, interleaved.
      threads: of PyTorch; as many as there are cores if 0.
    """

    sequences: int = 16
    length: int = 32
    rank: int = 8
    methods: tuple[str, ...] = ()
    rounds: int = 20
    threads: int = 0


@dataclasses.dataclass(frozen=True)
class Peers:
    """One method in both libraries.

    Attributes:
      ours: makes the method of a rank.
      theirs: makes PEFT's configuration of a rank and the names of the layers.
      optimizer: makes our optimizer of Adam and the adapted tree; Adam alone if None.
    """

    ours: Callable[[int], sj.Method]
    theirs: Callable[[Any, int, list[str]], Any]
    optimizer: Callable[[optax.GradientTransformation, Any], optax.GradientTransformation] | None = None


# Sizes other than LoRA's rank are PEFT's defaults. Its OFT approximates the Cayley transform by five terms of a series,
# and so does ours here.
METHODS = {
    "lora": Peers(sj.lora, lambda peft, r, names: peft.LoraConfig(r=r, lora_alpha=r, target_modules=names)),
    "dora": Peers(
        lambda rank: sj.dora(sj.lora(rank)),
        lambda peft, r, names: peft.LoraConfig(r=r, lora_alpha=r, target_modules=names, use_dora=True),
    ),
    "oft": Peers(
        lambda _: sj.oft(32, terms=5), lambda peft, _, names: peft.OFTConfig(oft_block_size=32, target_modules=names)
    ),
    "randlora": Peers(
        lambda _: sj.randlora(32, scaling="peft"),
        lambda peft, _, names: peft.RandLoraConfig(r=32, target_modules=names),
    ),
    "osf": Peers(
        lambda _: sj.osf(0.5), lambda peft, _, names: peft.OSFConfig(target_modules=names), sj.methods.osf.projection
    ),
}


@dataclasses.dataclass(frozen=True)
class Batch:
    """Tokens with a real mask, and vectors that the pooled hidden states are drawn to."""

    tokens: np.ndarray
    mask: np.ndarray
    targets: np.ndarray

    @classmethod
    def of(cls, config: Config) -> Batch:
        """Returns a batch of one seed; a quarter of every sequence is padding."""
        rng = np.random.default_rng(0)
        shape = (config.sequences, config.length)
        mask = np.ones(shape, np.int32)
        mask[:, config.length * 3 // 4 :] = 0
        targets = rng.standard_normal((config.sequences, 384)).astype(np.float32)
        return cls(rng.integers(1000, 20000, shape).astype(np.int32), mask, targets)


class _Run(abc.ABC):
    """A step that is run and timed, and returns its loss."""

    name = ""
    trainable_values = 0
    build_seconds = 0.0

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []

    @abc.abstractmethod
    def step(self) -> float: ...

    def run(self) -> None:
        """Runs and times one step."""
        start = time.perf_counter()
        self.losses.append(self.step())
        self.seconds.append(time.perf_counter() - start)


class JaxRun(_Run):
    """Full fine-tuning of the encoder's kernels, or LoRA on them."""

    def __init__(self, name: str, method: sj.Method, batch: Batch, peers: Peers | None = None):
        super().__init__()
        self.name = name
        model = load_minilm()
        tokens, mask, targets = map(jnp.asarray, (batch.tokens, batch.mask, batch.targets))

        def loss(params: Any) -> jax.Array:
            hidden: Any = model.module.apply({"params": params}, tokens, mask)
            return jnp.mean((mean_pool(hidden, mask) - targets) ** 2)

        adapted = sj.adapt(model.params, {KERNELS: method}, key=jax.random.key(0), roles=sj.roles(loss, model.params))
        self.learned, fixed = sj.partition(adapted)
        self.trainable_values = sum(leaf.size for leaf in jax.tree.leaves(self.learned))
        optimizer, adapted_loss = optax.adam(LEARNING_RATE), sj.with_adapters(loss)
        if peers is not None and peers.optimizer is not None:
            optimizer = peers.optimizer(optimizer, adapted)
        self.state = optimizer.init(self.learned)

        def step(learned: Any, state: Any, fixed: Any):
            value, gradients = jax.value_and_grad(lambda learned: adapted_loss(sj.combine(learned, fixed)))(learned)
            updates, state = optimizer.update(gradients, state, learned)
            return optax.apply_updates(learned, updates), state, value

        start = time.perf_counter()
        compiled = jax.jit(step).lower(self.learned, self.state, fixed).compile()
        self.build_seconds = time.perf_counter() - start
        self.compiled, self.fixed = compiled, fixed

    def step(self) -> float:
        """Runs one step."""
        self.learned, self.state, value = self.compiled(self.learned, self.state, self.fixed)
        return float(value)


class PeftRun(_Run):
    """PEFT's method on the same kernels, in PyTorch."""

    def __init__(self, name: str, peers: Peers, config: Config, batch: Batch):
        super().__init__()
        self.name = f"{name}, PEFT"
        import peft
        import torch
        import transformers
        from safetensors.torch import load_file

        torch.set_num_threads(config.threads or len(os.sched_getaffinity(0)))
        file = find_file("minilm", "model/model.safetensors")
        sizes: dict[str, Any] = {
            "hidden_size": 384,
            "num_hidden_layers": 6,
            "num_attention_heads": 12,
            "intermediate_size": 1536,
        }
        quiet: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = transformers.BertModel(transformers.BertConfig(**sizes, **quiet), add_pooling_layer=False)
        weights = {k: v for k, v in load_file(file).items() if "pooler" not in k and "position_ids" not in k}
        model.load_state_dict(weights)
        torch.manual_seed(0)
        targets = ["query", "key", "value", "dense"]
        self.model: Any = peft.get_peft_model(model, peers.theirs(peft, config.rank, targets))
        learned = [p for p in self.model.parameters() if p.requires_grad]
        self.trainable_values = sum(p.numel() for p in learned)
        self.optimizer = torch.optim.Adam(learned, lr=LEARNING_RATE)
        self.tokens, self.mask = (torch.tensor(v, dtype=torch.long) for v in (batch.tokens, batch.mask))
        self.targets = torch.tensor(batch.targets)

    def step(self) -> float:
        """Runs one step."""
        hidden = self.model(input_ids=self.tokens, attention_mask=self.mask).last_hidden_state
        mask = self.mask[..., None].to(hidden.dtype)
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        loss = ((pooled - self.targets) ** 2).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return float(loss)


def run(config: Config, console: Console) -> dict[str, Any]:
    """Measures both libraries, one step after the other."""
    unknown = sorted(set(config.methods) - set(METHODS))
    if unknown:
        raise SystemExit(f"methods={','.join(unknown)}: choose from {', '.join(METHODS)}.")
    chosen, batch = config.methods or tuple(METHODS), Batch.of(config)
    runs: list[Any] = [JaxRun("full kernels", sj.full(), batch)]
    absent = {}
    for name in chosen:
        console.print(f"  {name}")
        runs.append(JaxRun(name, METHODS[name].ours(config.rank), batch, METHODS[name]))
        try:
            runs.append(PeftRun(name, METHODS[name], config, batch))
        except ImportError as error:
            absent[f"{name}, PEFT"] = f"not installed: {error.name}"
    console.print(f"{config.rounds} rounds of {', '.join(r.name for r in runs)}")
    interleaved(runs, config.rounds)
    by_name = {r.name: r for r in runs}
    measured = {r.name: _values(r, by_name) for r in runs}
    notes = [
        "Same pretrained weights, batch, loss and Adam on the same kernels; JAX compiled once, PyTorch eager. Ratios "
        "are medians over rounds in which all ran one after the other. RandLoRA's sizes are PEFT's defaults; OSF "
        "freezes half of the singular triples.",
        *(f"{name}: absent, {reason}." for name, reason in absent.items()),
    ]
    return {
        **{"measured": measured, "methods": list(chosen), "notes": notes},
        "packages": ["torch", "peft", "transformers"],
    }


def _values(run: _Run, by_name: Mapping[str, _Run]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "trainable_values": run.trainable_values,
        "build_seconds": run.build_seconds,
        "losses": [run.losses[0], run.losses[-1]],
        "seconds": run.seconds,
    }
    theirs = by_name.get(f"{run.name}, PEFT")
    lora = by_name.get("lora, PEFT" if run.name.endswith(", PEFT") else "lora")
    for name, reference in (("of_peft", theirs), ("of_lora", lora)):
        if reference is not None:
            found[name] = paired_ratio(run.seconds, reference.seconds)
    return found


def tables(results: Mapping[str, Any]) -> list[tuple[str, Rows]]:
    """One row for each method."""
    head = ["method", "trained", "PEFT's", "ms", "PEFT's", "of PEFT's", "of our LoRA", "PEFT's, of its LoRA"]
    rows, measured = [head], results["measured"]
    for name in ("full kernels", *results["methods"]):
        ours, theirs = measured[name], measured.get(f"{name}, PEFT", {})
        rows.append(
            [
                *(name, f"{ours['trainable_values']:,}"),
                f"{theirs['trainable_values']:,}" if theirs else "",
                f"{1e3 * statistics.median(ours['seconds']):.1f}",
                f"{1e3 * statistics.median(theirs['seconds']):.1f}" if theirs else "",
                *(
                    number(ours.get("of_peft"), absent=""),
                    number(ours.get("of_lora"), absent=""),
                    number(theirs.get("of_lora"), absent=""),
                ),
            ]
        )
    return [("A step of MiniLM", rows)]


def charts(results: Mapping[str, Any]) -> list[Chart]:
    """Step times, and how they compare with LoRA's of the same library."""
    measured, times, ratios = results["measured"], {}, {}
    for name in ("full kernels", *results["methods"]):
        both = {"subspace_jax": measured[name], "PEFT": measured.get(f"{name}, PEFT")}
        times[name] = {who: 1e3 * statistics.median(one["seconds"]) for who, one in both.items() if one}
        ratios[name] = {who: one["of_lora"] for who, one in both.items() if one and "of_lora" in one}
    return [
        Chart("a step of MiniLM", "milliseconds", times),
        Chart("the same, relative", "relative to LoRA in the same library", ratios, reference=1.0),
    ]


BENCHMARK = Benchmark(
    name="peft_minilm",
    claim="How long steps of a pretrained MiniLM take here and in PyTorch PEFT on the same CPU, method by method.",
    config=Config,
    run=run,
    tables=tables,
    charts=charts,
)
