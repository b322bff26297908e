"""Streams of tasks for one backbone with a head for each task: what the continual experiments share.

Every method sees the same tasks in the same order, the same examples, and the same number of steps. The learning rate
of each is chosen on the validation split of shorter streams, with seeds that are used for nothing else, from a grid
that grows until its best lies inside. Heads learn at a rate of their own, the same for all.
"""

from experiments.tasks.streams._data import StreamConfig as StreamConfig
from experiments.tasks.streams._data import StreamData as StreamData
from experiments.tasks.streams._experiment import experiment as experiment
from experiments.tasks.streams._heads import head_logits as head_logits
from experiments.tasks.streams._heads import start_heads as start_heads
from experiments.tasks.streams._learners import METHODS as METHODS
from experiments.tasks.streams._learners import TITLES as TITLES
from experiments.tasks.streams._run import Streams as Streams
from experiments.tasks.streams._show import plot as plot
from experiments.tasks.streams._show import rows as rows

__all__ = [
    "METHODS",
    "TITLES",
    "StreamConfig",
    "StreamData",
    "Streams",
    "experiment",
    "head_logits",
    "plot",
    "rows",
    "start_heads",
]
