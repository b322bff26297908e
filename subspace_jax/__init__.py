"""Adapt pretrained JAX models: stand-in weights and subspace gradient transformations.

The mechanism and one or two names of each method are here. All that a method has is in `sj.methods.<slug>`, such as
`sj.methods.osf.ranks`; `sj.methods` lists them, `sj.catalogue()` tells their publications.
"""

import importlib
from typing import TYPE_CHECKING, Any

from subspace_jax import banks as banks
from subspace_jax import continual as continual
from subspace_jax import core as core
from subspace_jax import errors as errors
from subspace_jax import io as io
from subspace_jax import linalg as linalg
from subspace_jax import manifolds as manifolds
from subspace_jax import merging as merging
from subspace_jax import methods as methods
from subspace_jax import metrics as metrics
from subspace_jax import modules as modules
from subspace_jax import optim as optim
from subspace_jax import reports as reports
from subspace_jax import sharding as sharding
from subspace_jax import weights as weights
from subspace_jax.banks import bank as bank
from subspace_jax.banks import per_row as per_row
from subspace_jax.continual import run_stream as run_stream
from subspace_jax.core import Method as Method
from subspace_jax.core import Role as Role
from subspace_jax.core import Weight as Weight
from subspace_jax.core import adapt as adapt
from subspace_jax.core import capture as capture
from subspace_jax.core import catalogue as catalogue
from subspace_jax.core import combine as combine
from subspace_jax.core import full as full
from subspace_jax.core import merge as merge
from subspace_jax.core import partition as partition
from subspace_jax.core import roles as roles
from subspace_jax.core import summary as summary
from subspace_jax.core import with_adapters as with_adapters
from subspace_jax.core import with_dropout as with_dropout
from subspace_jax.io import load_adapter as load_adapter
from subspace_jax.io import load_peft as load_peft
from subspace_jax.io import restore_checkpoint as restore_checkpoint
from subspace_jax.io import save_adapter as save_adapter
from subspace_jax.io import save_checkpoint as save_checkpoint
from subspace_jax.io import save_peft as save_peft
from subspace_jax.methods.continual.coso import coso as coso
from subspace_jax.methods.continual.coso import scale_by_coso as scale_by_coso
from subspace_jax.methods.continual.o_lora import o_lora as o_lora
from subspace_jax.methods.continual.osf import osf as osf
from subspace_jax.methods.low_rank.corda import corda as corda
from subspace_jax.methods.low_rank.dora import dora as dora
from subspace_jax.methods.low_rank.loldu import loldu as loldu
from subspace_jax.methods.low_rank.lora import lora as lora
from subspace_jax.methods.low_rank.lora_sb import lora_sb as lora_sb
from subspace_jax.methods.low_rank.matryoshka import matryoshka as matryoshka
from subspace_jax.methods.low_rank.pissa import pissa as pissa
from subspace_jax.methods.low_rank.pissa import qpissa as qpissa
from subspace_jax.methods.low_rank.pissa import to_lora as to_lora
from subspace_jax.methods.low_rank.qlora import qlora as qlora
from subspace_jax.methods.low_rank.svfit import svfit as svfit
from subspace_jax.methods.optimizers.dct_lowrank import dct_adam as dct_adam
from subspace_jax.methods.optimizers.dct_lowrank import trion as trion
from subspace_jax.methods.optimizers.galore import galore as galore
from subspace_jax.methods.optimizers.lora_pro import lora_pro as lora_pro
from subspace_jax.methods.regularized.lambda_orthogonality import lambda_orthogonality as lambda_orthogonality
from subspace_jax.methods.sparse.lift import lift as lift
from subspace_jax.methods.sparse.s2ft import s2ft as s2ft
from subspace_jax.methods.structured.flora import flora as flora
from subspace_jax.methods.structured.loca import loca as loca
from subspace_jax.methods.structured.oft import oft as oft
from subspace_jax.methods.structured.randlora import randlora as randlora
from subspace_jax.methods.structured.soka import soka as soka
from subspace_jax.methods.structured.ssf import ssf as ssf
from subspace_jax.modules import bottleneck as bottleneck
from subspace_jax.optim import project_orthogonal as project_orthogonal
from subspace_jax.optim import riemannian as riemannian
from subspace_jax.optim import sandwich as sandwich
from subspace_jax.reports import report as report
from subspace_jax.sharding import shardings as shardings
from subspace_jax.sharding import state_shardings as state_shardings

if TYPE_CHECKING:
    from subspace_jax import data as data
    from subspace_jax import models as models
    from subspace_jax import training as training

__version__ = "0.2.0"

io.register_library_for_export()  # once all stand-in weights are defined

# Imported when first used: they need packages of the extras, or time to load.
_LAZY = ("data", "models", "training")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f"subspace_jax.{name}")
    raise AttributeError(f"module 'subspace_jax' has no attribute {name!r}; what a method has is in sj.methods.<slug>.")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])


__all__ = [
    "Method",
    "Role",
    "Weight",
    "__version__",
    "adapt",
    "bank",
    "banks",
    "bottleneck",
    "capture",
    "catalogue",
    "combine",
    "continual",
    "corda",
    "core",
    "coso",
    "data",
    "dct_adam",
    "dora",
    "errors",
    "flora",
    "full",
    "galore",
    "io",
    "lambda_orthogonality",
    "lift",
    "linalg",
    "load_adapter",
    "load_peft",
    "loca",
    "loldu",
    "lora",
    "lora_pro",
    "lora_sb",
    "manifolds",
    "matryoshka",
    "merge",
    "merging",
    "methods",
    "metrics",
    "models",
    "modules",
    "o_lora",
    "oft",
    "optim",
    "osf",
    "partition",
    "per_row",
    "pissa",
    "project_orthogonal",
    "qlora",
    "qpissa",
    "randlora",
    "report",
    "reports",
    "restore_checkpoint",
    "riemannian",
    "roles",
    "run_stream",
    "s2ft",
    "sandwich",
    "save_adapter",
    "save_checkpoint",
    "save_peft",
    "scale_by_coso",
    "sharding",
    "shardings",
    "soka",
    "ssf",
    "state_shardings",
    "summary",
    "svfit",
    "to_lora",
    "training",
    "trion",
    "weights",
    "with_adapters",
    "with_dropout",
]
