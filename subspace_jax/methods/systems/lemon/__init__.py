"""LeMON: one transformer for many equations, pretrained or meta-learned over families and tuned on a few samples."""

from subspace_jax.core import register
from subspace_jax.methods.systems.lemon._families import Family as Family
from subspace_jax.methods.systems.lemon._families import Trajectories as Trajectories
from subspace_jax.methods.systems.lemon._families import add_noise as add_noise
from subspace_jax.methods.systems.lemon._families import draw_trajectories as draw_trajectories
from subspace_jax.methods.systems.lemon._families import grid as grid
from subspace_jax.methods.systems.lemon._kinds import linear_family as linear_family
from subspace_jax.methods.systems.lemon._learning import Batch as Batch
from subspace_jax.methods.systems.lemon._learning import input_statistics as input_statistics
from subspace_jax.methods.systems.lemon._learning import lemon_loss as lemon_loss
from subspace_jax.methods.systems.lemon._learning import predict as predict
from subspace_jax.methods.systems.lemon._learning import relative_errors as relative_errors
from subspace_jax.methods.systems.lemon._learning import train as train
from subspace_jax.methods.systems.lemon._learning import warmup_cosine as warmup_cosine
from subspace_jax.methods.systems.lemon._lora import lemon_lora as lemon_lora
from subspace_jax.methods.systems.lemon._lora import lora_rules as lora_rules
from subspace_jax.methods.systems.lemon._model import Lemon as Lemon
from subspace_jax.methods.systems.lemon._model import LemonConfig as LemonConfig
from subspace_jax.methods.systems.lemon._paml import RateNetwork as RateNetwork
from subspace_jax.methods.systems.lemon._paml import adapt_to as adapt_to
from subspace_jax.methods.systems.lemon._paml import paml_loss as paml_loss
from subspace_jax.methods.systems.lemon._symbols import decode_float as decode_float
from subspace_jax.methods.systems.lemon._symbols import encode_equations as encode_equations
from subspace_jax.methods.systems.lemon._symbols import encode_float as encode_float
from subspace_jax.methods.systems.lemon._symbols import prefix as prefix
from subspace_jax.methods.systems.lemon._symbols import vocabulary as vocabulary
from subspace_jax.methods.systems.lemon._table import PRETRAINING as PRETRAINING
from subspace_jax.methods.systems.lemon._table import families as families
from subspace_jax.methods.systems.lemon._table import new_families as new_families

__all__ = [
    "PRETRAINING",
    "Batch",
    "Family",
    "Lemon",
    "LemonConfig",
    "RateNetwork",
    "Trajectories",
    "adapt_to",
    "add_noise",
    "decode_float",
    "draw_trajectories",
    "encode_equations",
    "encode_float",
    "families",
    "grid",
    "input_statistics",
    "lemon_lora",
    "lemon_loss",
    "linear_family",
    "lora_rules",
    "new_families",
    "paml_loss",
    "predict",
    "prefix",
    "relative_errors",
    "train",
    "vocabulary",
    "warmup_cosine",
]

register(
    __name__,
    title="LeMON: Learning to Learn Multi-Operator Networks",
    authors="Sun, Zhang, Schaeffer",
    year=2024,
    kinds=("system", "weight"),
    use_for="Partial differential equations with few samples of a new one.",
    not_for="There is one equation and plenty of data.",
    differs=(
        "The two cosine fluxes complete the paper's list; in the official code queries, keys and values are not "
        "adapted, which `official_targets=True` repeats."
    ),
)
