"""The entry of an experiment with a stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from experiments.runner import Context, Experiment, Tuning
from experiments.tasks.streams._data import StreamData
from experiments.tasks.streams._run import Streams
from experiments.tasks.streams._show import plot, rows


def experiment(
    name: str, claim: str, config: type, load: Callable[[Any], StreamData], assets: tuple[str, ...]
) -> Experiment:
    """Returns the experiment that runs every method on the tasks that `load` gives.

    Args:
      name: what it is called on the command line.
      claim: what it shows.
      config: of the settings, a subclass of `StreamConfig`.
      load: makes the tasks of a configuration.
      assets: packages of real data and weights that it needs.
    """

    def run(config: Any, context: Context) -> dict[str, Any]:
        return Streams(load(config), config, context).run()

    return Experiment(name, claim, config, run, rows, plot=plot, assets=assets, tuning=Tuning(runs="tuning"))
