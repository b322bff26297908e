"""The league: three real tasks, every way of fine-tuning, one protocol."""

from experiments.tasks.league._arms import ARMS as ARMS
from experiments.tasks.league._arms import Arm as Arm
from experiments.tasks.league._budget import Budget as Budget
from experiments.tasks.league._budget import find_budget as find_budget
from experiments.tasks.league._causal import CausalJob as CausalJob
from experiments.tasks.league._classify import TextClasses as TextClasses
from experiments.tasks.league._classify import VisionClasses as VisionClasses
from experiments.tasks.league._job import Job as Job
from experiments.tasks.league._table import overview as overview
from experiments.tasks.league._table import plot as plot
from experiments.tasks.league._table import rows as rows

__all__ = [
    "ARMS",
    "Arm",
    "Budget",
    "CausalJob",
    "Job",
    "TextClasses",
    "VisionClasses",
    "find_budget",
    "overview",
    "plot",
    "rows",
]
