"""Which rank is trained for how many steps."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

from subspace_jax.core import RankError, check_choice, check_int, check_rank

Split = Literal["equal", "min_stage", "rank_proportional"]


class Stage(NamedTuple):
    """One stage of training.

    Attributes:
      rank: that is trained.
      steps: of the optimizer.
    """

    rank: int
    steps: int


def stages(source: int, target: int, steps: int, *, split: Split = "equal", least: int = 200) -> tuple[Stage, ...]:
    """Splits a number of steps over ranks that fall by halves, as In-Squeeze trains them.

    Args:
      source: the first rank.
      target: the last rank; halves of odd ranks are rounded up, and a half below the target is the target.
      steps: together, no more than direct training would take.
      split: "equal" parts, whose remainder the target gets; "min_stage" gives every rank above the target `least`
        steps and the target what is left; "rank_proportional" splits in proportion to ranks, rounded down, and the
        target gets the remainder.
      least: steps of a rank above the target, for "min_stage".

    Returns:
      Ranks and steps in order.

    Raises:
      RankError: a rank or a number of steps is no positive integer, `target` is above `source`, or there are too few
        steps for one stage.

    Example:
      >>> stages(32, 4, 202)
      (Stage(rank=32, steps=50), Stage(rank=16, steps=50), Stage(rank=8, steps=50), Stage(rank=4, steps=52))
    """
    source, target = check_rank(source, what="stages: source"), check_rank(target, source, what="stages: target")
    steps, least = check_int("stages: steps", steps), check_int("stages: least", least)
    check_choice("stages: split", split, get_args(Split))
    ranks = [source]
    while ranks[-1] > target:
        ranks.append(max(target, -(-ranks[-1] // 2)))
    if split == "equal":
        above = [steps // len(ranks)] * (len(ranks) - 1)
    elif split == "min_stage":
        above = [least] * (len(ranks) - 1)
    else:
        above = [steps * rank // sum(ranks) for rank in ranks[:-1]]
    counts = [*above, steps - sum(above)]
    if min(counts) < 1:
        raise RankError(
            f"stages: steps={steps} are too few for {len(ranks)} stages of the ranks {ranks} with split={split!r}, "
            f"which would take {counts} steps each."
        )
    return tuple(Stage(rank, count) for rank, count in zip(ranks, counts, strict=True))
