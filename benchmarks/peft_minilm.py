"""One LoRA step of a pretrained MiniLM here and in PyTorch PEFT: same weights, batch, rank and loss, on the CPU."""

from __future__ import annotations

import abc
import dataclasses
import os
import statistics
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

import subspace_jax as sj
from benchmarks._benchmark import Benchmark, Rows
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
      rank: of every adapter, on all kernels of the encoder.
      rounds: timed steps of each, interleaved.
      threads: of PyTorch; as many as there are cores if 0.
    """

    sequences: int = 16
    length: int = 32
    rank: int = 8
    rounds: int = 20
    threads: int = 0


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

    def __init__(self, name: str, method: sj.Method, batch: Batch):
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
    """PEFT's LoRA on the same kernels, in PyTorch."""

    name = "PEFT LoRA"
    build_seconds = 0.0

    def __init__(self, config: Config, batch: Batch):
        super().__init__()
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
        targets = ["query", "key", "value", "dense"]
        self.model: Any = peft.get_peft_model(
            model, peft.LoraConfig(r=config.rank, lora_alpha=config.rank, target_modules=targets)
        )
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
    batch = Batch.of(config)
    runs: list[Any] = [JaxRun("full kernels", sj.full(), batch), JaxRun("lora", sj.lora(config.rank), batch)]
    absent = {}
    try:
        runs.append(PeftRun(config, batch))
    except ImportError as error:
        absent["PEFT LoRA"] = f"not installed: {error.name}"
    console.print(f"{config.rounds} rounds of {', '.join(r.name for r in runs)}")
    interleaved(runs, config.rounds)
    ours = next(r for r in runs if r.name == "lora")
    measured = {
        r.name: {
            "trainable_values": r.trainable_values,
            "build_seconds": r.build_seconds,
            "losses": [r.losses[0], r.losses[-1]],
            "seconds": r.seconds,
            "seconds_ratio": paired_ratio(r.seconds, ours.seconds),
        }
        for r in runs
    }
    notes = [
        "Same pretrained weights, batch, rank, loss and Adam; JAX compiled once, PyTorch eager. Ratios are medians "
        "over rounds in which all ran one after the other.",
        *(f"{name}: absent, {reason}." for name, reason in absent.items()),
    ]
    order = [r.name for r in runs]
    return {"measured": measured, "order": order, "notes": notes, "packages": ["torch", "peft", "transformers"]}


def tables(results: Mapping[str, Any]) -> list[tuple[str, Rows]]:
    """One row for each way."""
    rows = [["way", "trainable", "compile s", "first loss", "last loss", "step ms", "time / lora"]]
    for name in results["order"]:
        values = results["measured"][name]
        first, last = values["losses"]
        rows.append(
            [
                name,
                f"{values['trainable_values']:,}",
                f"{values['build_seconds']:.1f}" if values["build_seconds"] else "-",
                f"{first:.5f}",
                f"{last:.5f}",
                f"{1e3 * statistics.median(values['seconds']):.1f}",
                f"{values['seconds_ratio']:.3f}",
            ]
        )
    return [("A step of MiniLM", rows)]


BENCHMARK = Benchmark(
    name="peft_minilm",
    claim="How long a LoRA step of a pretrained MiniLM takes here and in PyTorch PEFT on the same CPU.",
    config=Config,
    run=run,
    tables=tables,
)
