"""Operator-learning tasks: pairs of functions on a grid."""

import dataclasses
import os

import numpy as np

from subspace_jax.data._prepare import open_dataset
from subspace_jax.data._sources import OPERATOR_SOURCES
from subspace_jax.data._task import Task, read_rows


@dataclasses.dataclass(frozen=True, eq=False)
class OperatorSplit:
    """One split of an operator task.

    Attributes:
        inputs: float32 [n, ...], coefficients or initial conditions.
        outputs: float32 [n, ...], solutions.
    """

    inputs: np.ndarray
    outputs: np.ndarray

    def __len__(self) -> int:
        return len(self.inputs)


@dataclasses.dataclass(frozen=True, eq=False)
class OperatorTask(Task[OperatorSplit]):
    """Pairs of functions in memory, as a solver gave them.

    Attributes:
        name: name of the dataset.
        splits: the splits by name.
    """

    def arrays(self, split: str) -> dict[str, np.ndarray]:
        """Returns a split's `inputs` and `outputs`."""
        chosen = self[split]
        return {"inputs": chosen.inputs, "outputs": chosen.outputs}


def load_operator_task(
    name: str,
    *,
    train_size: int | None = None,
    seed: int = 0,
    data_dir: str | os.PathLike[str] | None = None,
) -> OperatorTask:
    """Loads a packaged operator dataset into memory, preparing it in the cache when it is first asked for.

    Args:
        name: one of `operator_tasks()`.
        train_size: number of training examples to draw; all if None.
        seed: non-negative seed of the draw.
        data_dir: tfds folder; `tfds` in the cache folder if None.

    Returns:
        The task. `darcy32` has a test split only.

    Raises:
        AssetMissingError: the package that carries the dataset is not here.
        ImportError: the `tfds` extra is not installed.
        ValueError: the dataset is unknown, or smaller than asked.
    """
    if name not in OPERATOR_SOURCES:
        raise ValueError(f"no operator task is called {name!r}; there are {', '.join(OPERATOR_SOURCES)}")
    splits = {}
    for split, source in open_dataset(name, data_dir)[1].items():
        wanted = train_size if split == "train" else None
        examples = list(read_rows(name, split, source, wanted, seed=seed))
        splits[split] = OperatorSplit(
            np.stack([example["input"] for example in examples]),
            np.stack([example["output"] for example in examples]),
        )
    return OperatorTask(name=name, splits=splits)
