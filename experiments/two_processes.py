"""Two connected processes fine-tune MiniLM; one is killed, and both resume bit-identically.

Each process stands for a host of a pod: they find each other through `jax.distributed`, each sees half of every batch,
and gradients are summed between them. LoRA learns on all kernels of the encoder after `project_orthogonal`, with a
random subspace of every value kernel's inputs kept out. Three runs: one that nobody disturbs, one in which the second
process is killed (SIGKILL) after some steps, and one that resumes from the checkpoint of that. Compared are all bytes
of what learns, of the optimizer's state and of the frozen weights.

    python -m experiments run two_processes

The model is the pretrained one, the data are real reviews; nothing is claimed of accuracy.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

import subspace_jax as sj
from experiments.runner import Context, Experiment
from experiments.tasks.text_job import KERNELS, TextJob
from subspace_jax import training

PROJECTED = "/attention/value/kernel"


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
      task: one of `subspace_jax.data.text_tasks()` with class labels.
      steps: optimizer steps.
      kill_after: steps after which one process is killed.
      every: steps between checkpoints.
      batch_size: examples of a step, of both processes together.
      max_length: tokens of an example.
      train_size: training examples that a run may see.
      rank: of the adapters.
      removed: dimensions of the subspaces that no update may enter.
      learning_rate: of SGD with momentum.
    """

    task: str = "rotten_tomatoes"
    steps: int = 12
    kill_after: int = 7
    every: int = 3
    batch_size: int = 16
    max_length: int = 32
    train_size: int = 512
    rank: int = 8
    removed: int = 32
    learning_rate: float = 0.3


def process(number: int, port: int, folder: Path, config: Config) -> None:
    """What each of the two does."""
    training.initialize_distributed(f"127.0.0.1:{port}", 2, number, heartbeat_timeout_seconds=10)
    job = TextJob(
        config.task,
        steps=config.steps,
        batch_size=config.batch_size,
        max_length=config.max_length,
        train_size=config.train_size,
        test_size=8,
    )
    params = job.start(0)
    adapted = sj.adapt(params, {KERNELS: sj.lora(config.rank), "classifier/*": sj.full()}, key=jax.random.key(1))
    bases = _bases(adapted, config.removed)
    optimizer = optax.chain(sj.project_orthogonal(bases), optax.sgd(config.learning_rate, momentum=0.9))
    mesh = training.make_mesh({"data": -1})
    everywhere = NamedSharding(mesh, PartitionSpec())
    state = training.init_train_state(
        adapted, optimizer, jax.random.key(2), jax.tree.map(lambda _: everywhere, adapted)
    )
    before = _factors(state.trainable)

    def batches(start: int) -> Iterator[Any]:
        mine = slice(number, None, 2)
        for i, batch in enumerate(job.batches(0)):
            if i >= start:
                yield training.shard_batch({name: value[mine] for name, value in batch.items()}, mesh)

    def report(step: int, metrics: Mapping[str, jax.Array]) -> None:
        print(json.dumps({"step": step, "loss": float(metrics["loss"])}), flush=True)

    step = training.make_train_step(lambda tree, batch, key: job.loss(tree, batch), optimizer)
    with sj.io.Checkpointer(folder / "checkpoints", base=params, max_to_keep=2) as checkpointer:
        state = training.fit(
            state,
            step,
            batches,
            steps=config.steps,
            checkpointer=checkpointer,
            every=config.every,
            on_metrics=report,
        )
    after = _factors(state.trainable)
    leaks = [np.abs(basis.T @ (after[path] - before[path])).max() for path, basis in bases.items()]
    moved = min(float(np.abs(after[path] - before[path]).max()) for path in bases)
    leaves = jax.tree.leaves((state.trainable, state.frozen, state.opt_state))
    found = hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in leaves)).hexdigest()
    print(json.dumps({"sha256": found, "leak": float(max(leaks)), "moved": moved}), flush=True)
    jax.distributed.shutdown()


def _bases(adapted: Any, columns: int) -> dict[str, np.ndarray]:
    """A random subspace of the inputs of every value kernel."""
    rng, found = np.random.default_rng(0), {}
    for path, leaf in sj.core.leaves_with_paths(adapted):
        if path.endswith(PROJECTED):
            found[path] = np.linalg.qr(rng.normal(size=(leaf.shape[0], columns)))[0].astype(np.float32)
    return found


def _factors(trainable: Any) -> dict[str, np.ndarray]:
    leaves = sj.core.leaves_with_paths(trainable)
    return {path: np.asarray(leaf.a) for path, leaf in leaves if path.endswith(PROJECTED)}


def run(config: Config, context: Context) -> dict[str, Any]:
    """Runs the pair undisturbed, disturbed, and again; raises where the ends differ."""
    folder = context.folder / f"pair-{time.time_ns()}"
    seconds, (whole, twin) = _pair(config, folder / "whole")
    if whole[-1] != twin[-1]:
        raise RuntimeError(f"The two processes ended in different arrays: {whole[-1]} and {twin[-1]}.")
    context.console.print(f"undisturbed: {seconds:.0f} s")
    _pair(config, folder / "broken", kill_after=config.kill_after)
    context.console.print(f"the second process was killed after step {config.kill_after}")
    _, (resumed, _) = _pair(config, folder / "broken")
    return {
        "steps": config.steps,
        "killed_after": config.kill_after,
        "resumed_at": resumed[0]["step"],
        "same_bits": resumed[-1]["sha256"] == whole[-1]["sha256"],
        "losses": [line["loss"] for line in whole[:-1]],
        "leak": whole[-1]["leak"],
        "moved": whole[-1]["moved"],
        "seconds": seconds,
    }


def _pair(config: Config, folder: Path, kill_after: int | None = None) -> tuple[float, list[list[dict[str, Any]]]]:
    """Starts both processes and returns seconds and what each printed; nothing if one is killed on the way."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = json.dumps(dataclasses.asdict(config))
    command = [sys.executable, "-m", "experiments.two_processes"]
    start = time.perf_counter()
    pair = [
        subprocess.Popen(
            [*command, str(i), str(port), str(folder), settings],
            stdout=subprocess.PIPE,
            stderr=(folder / f"errors-{i}.txt").open("w"),
            text=True,
        )
        for i in range(2)
    ]
    try:
        if kill_after is not None:
            for line in pair[0].stdout or ():
                if line.startswith("{") and json.loads(line).get("step") == kill_after:
                    pair[1].kill()
                    return 0.0, []
        lines = [one.communicate()[0].splitlines() for one in pair]
        if failed := [one.returncode for one in pair if one.returncode]:
            raise RuntimeError(f"A process ended with {failed[0]}; see errors-0.txt and errors-1.txt in {folder}.")
        return time.perf_counter() - start, [_results(one) for one in lines]
    finally:
        for one in pair:
            one.kill()
            one.wait()


def _results(lines: Sequence[str]) -> list[dict[str, Any]]:
    """What a process printed itself; the library that connects them prints as well."""
    return [json.loads(line) for line in lines if line.startswith("{")]


def rows(results: Mapping[str, Any]) -> Sequence[Sequence[str]]:
    """Returns the table."""
    return [
        ["steps", "killed after", "went on with step", "same bits", "loss", "leak into the removed subspaces"],
        [
            str(results["steps"]),
            str(results["killed_after"]),
            str(results["resumed_at"]),
            "yes" if results["same_bits"] else "NO",
            f"{results['losses'][0]:.3f} to {results['losses'][-1]:.3f}",
            f"{results['leak']:.1e} of {results['moved']:.1e}",
        ],
    ]


EXPERIMENT = Experiment(
    name="two_processes",
    claim="Two connected processes train MiniLM; killed and started again they end in the same bits.",
    config=Config,
    run=run,
    rows=rows,
    assets=("quickstart",),
)

if __name__ == "__main__":
    process(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Config(**json.loads(sys.argv[4])))
