"""The table of families and its split into those to pretrain on and those that are new."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from . import _kinds as kinds
from . import _solvers as solvers
from . import _trees as trees
from ._families import LENGTH, Family

PRETRAINING = (
    "advection",
    "viscous_sine_flux",
    "diffusion_reaction_bistable",
    "fokker_planck",
    "heat",
    "inviscid_cubic_flux",
    "klein_gordon",
)
"""The seven families that the publication pretrains on; the others are new."""


@functools.cache
def families() -> Mapping[str, Family]:
    """Returns the 21 families with the publication's coefficients; the two cosine fluxes complete its list.

    Example:
      >>> len(families()), families()["heat"].centers
      (21, {'c': 0.003})
    """
    energy = lambda c, k: np.sqrt(c["c"] ** 2 * k**2 + c["m"] ** 2 * c["c"] ** 4)  # noqa: E731
    found = [
        kinds.linear_family("heat", c=3e-3),
        Family("porous_medium", {}, trees.porous_medium, kinds.porous_medium, t_final=0.1, choices={"m": (2, 3, 4)}),
        Family(
            "klein_gordon",
            {"c": 1.0, "m": 0.1},
            trees.klein_gordon,
            kinds.modes(lambda c, k, t: np.cos(energy(c, k) * t)),
            t_final=1.0,
        ),
        Family("sine_gordon", {"c": 1.0}, trees.sine_gordon, kinds.sine_gordon, t_final=1.0),
        Family(
            "cahn_hilliard",
            {"eps": 0.01},
            trees.cahn_hilliard,
            lambda c, u0, times: solvers.stabilized_implicit(u0, times, LENGTH, c["eps"], 1e-4),
            t_final=0.5,
        ),
        Family("korteweg_de_vries", {"delta": 0.022}, trees.korteweg_de_vries, kinds.korteweg_de_vries, t_final=1.0),
        kinds.linear_family("advection", beta=0.5),
        dataclasses.replace(kinds.linear_family("wave", c=0.5), t_final=1.0),
        *(kinds.growth(kind) for kind in ("logistic", "linear", "bistable", "square_logistic")),
        *(kinds.law(kind, viscous) for viscous in (True, False) for kind in ("burgers", "cubic", "sine", "cosine")),
        Family(
            "fokker_planck",
            {"eta": 1e-3},
            trees.fokker_planck,
            kinds.fokker_planck,
            t_final=0.1,
            derived=kinds.brownian,
        ),
    ]
    return MappingProxyType({family.name: family for family in found})


def new_families() -> tuple[str, ...]:
    """Returns the names of the families that the publication does not pretrain on.

    Example:
      >>> len(new_families())
      14
    """
    return tuple(name for name in families() if name not in PRETRAINING)
