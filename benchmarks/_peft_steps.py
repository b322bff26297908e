"""One process of the benchmark `peft_minilm`: steps here and in PyTorch, one after the other, as JSON.

python -m benchmarks._peft_steps SETTINGS
"""

from __future__ import annotations

import abc
import dataclasses
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import subspace_jax as sj
from benchmarks._measure import interleaved
from subspace_jax.assets import find_file
from subspace_jax.models import load_minilm, mean_pool

KERNELS = "encoder/**/kernel"
LEARNING_RATE = 1e-4
FULL = "full kernels"
COMPILED = ", torch.compile"


@dataclasses.dataclass(frozen=True)
class Steps:
    """What one process measures.

    Attributes:
      sequences: sequences in the batch.
      length: tokens in a sequence.
      rank: of LoRA, DoRA and PiSSA, on all kernels of the encoder.
      methods: those of METHODS.
      rounds: timed steps of each, interleaved.
      threads: of both libraries.
      compile_peft: whether to measure the first method's PEFT model under `torch.compile` too.
    """

    sequences: int
    length: int
    rank: int
    methods: tuple[str, ...]
    rounds: int
    threads: int
    compile_peft: bool


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
    "pissa": Peers(
        sj.pissa,
        lambda peft, r, names: peft.LoraConfig(
            r=r, lora_alpha=r, target_modules=names, init_lora_weights="pissa_niter_4"
        ),
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
    def of(cls, config: Steps) -> Batch:
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
    start_seconds = 0.0
    build_seconds = 0.0

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.faults: list[int] = []
        self.system: list[float] = []
        self.losses: list[float] = []

    @abc.abstractmethod
    def step(self) -> float: ...

    def run(self) -> None:
        """Runs and times one step, with what the system did for it."""
        before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        self.losses.append(self.step())
        self.seconds.append(time.perf_counter() - start)
        after = resource.getrusage(resource.RUSAGE_SELF)
        self.faults.append(after.ru_minflt - before.ru_minflt)
        self.system.append(after.ru_stime - before.ru_stime)

    def values(self) -> dict[str, Any]:
        """Returns everything measured; the first step is no part of it."""
        return {
            "trainable_values": self.trainable_values,
            "start_seconds": self.start_seconds,
            "build_seconds": self.build_seconds,
            "losses": [self.losses[0], self.losses[-1]],
            "seconds": self.seconds,
            "faults": self.faults[1:],
            "system": self.system[1:],
        }


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

        roles, start = sj.roles(loss, model.params), time.perf_counter()
        adapted = jax.block_until_ready(sj.adapt(model.params, {KERNELS: method}, key=jax.random.key(0), roles=roles))
        self.start_seconds = time.perf_counter() - start
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
    """PEFT's method on the same kernels, in PyTorch, or full fine-tuning of them."""

    def __init__(self, name: str, peers: Peers | None, config: Steps, batch: Batch, *, compiled: bool = False):
        super().__init__()
        self.name = f"{name}, PEFT{COMPILED if compiled else ''}"
        import peft
        import torch
        import transformers
        from safetensors.torch import load_file

        torch.set_num_threads(config.threads)
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
        targets, start = ["query", "key", "value", "dense"], time.perf_counter()
        if peers is None:
            for parameter_name, parameter in model.named_parameters():
                parameter.requires_grad_(any(f"{t}.weight" in parameter_name for t in targets))
        self.model: Any = (
            model if peers is None else peft.get_peft_model(model, peers.theirs(peft, config.rank, targets))
        )
        self.start_seconds = time.perf_counter() - start
        self.model = torch.compile(self.model) if compiled else self.model
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
        return float(loss.detach())


def measure(config: Steps) -> dict[str, Any]:
    """Returns what every way takes, by name, and the reasons of those that are absent."""
    batch = Batch.of(config)
    runs: list[Any] = [JaxRun(FULL, sj.full(), batch)]
    absent: dict[str, str] = {}

    def theirs(name: str, peers: Peers | None, *, compiled: bool = False) -> None:
        try:
            runs.append(PeftRun(name, peers, config, batch, compiled=compiled))
        except ImportError as error:
            absent[f"{name}, PEFT"] = f"not installed: {error.name}"

    theirs(FULL, None)
    for name in config.methods:
        runs.append(JaxRun(name, METHODS[name].ours(config.rank), batch, METHODS[name]))
        theirs(name, METHODS[name])
    if config.compile_peft and config.methods:
        theirs(config.methods[0], METHODS[config.methods[0]], compiled=True)
    interleaved(runs, config.rounds)
    return {"measured": {run.name: run.values() for run in runs}, "absent": absent}


def main(settings: str) -> None:
    """Prints one line of JSON."""
    found = json.loads(settings)
    config = Steps(**{**found, "methods": tuple(found["methods"])})
    if hasattr(os, "sched_setaffinity"):  # before any thread of JAX is made
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[: config.threads]))
    print(json.dumps(measure(config)))


if __name__ == "__main__":
    main(sys.argv[1])
