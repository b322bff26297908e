"""What runs experiments and benchmarks: settings, command line, progress, results and tables."""

from experiments.runner._cli import main as main
from experiments.runner._commands import Settings as Settings
from experiments.runner._commands import by_family as by_family
from experiments.runner._commands import configure as configure
from experiments.runner._commands import entry as entry
from experiments.runner._commands import list_entries as list_entries
from experiments.runner._commands import run_commands as run_commands
from experiments.runner._experiment import Context as Context
from experiments.runner._experiment import Experiment as Experiment
from experiments.runner._experiment import Tuning as Tuning
from experiments.runner._registry import find as find
from experiments.runner._registry import find_module as find_module
from experiments.runner._registry import modules as modules
from experiments.runner._registry import names as names
from experiments.runner._results import best_rates as best_rates
from experiments.runner._results import best_runs as best_runs
from experiments.runner._results import environment as environment
from experiments.runner._results import grids as grids
from experiments.runner._results import human_bytes as human_bytes
from experiments.runner._results import markdown_table as markdown_table
from experiments.runner._results import mean_and_spread as mean_and_spread
from experiments.runner._results import read_json as read_json
from experiments.runner._results import terminal_table as terminal_table
from experiments.runner._results import with_spread as with_spread
from experiments.runner._results import write_json as write_json
from experiments.runner._search import widened as widened

__all__ = [
    "Context",
    "Experiment",
    "Settings",
    "Tuning",
    "best_rates",
    "best_runs",
    "by_family",
    "configure",
    "entry",
    "environment",
    "find",
    "find_module",
    "grids",
    "human_bytes",
    "list_entries",
    "main",
    "markdown_table",
    "mean_and_spread",
    "modules",
    "names",
    "read_json",
    "run_commands",
    "terminal_table",
    "widened",
    "with_spread",
    "write_json",
]
