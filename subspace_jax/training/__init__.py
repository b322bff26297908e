"""Training on one device or on a pod: mesh, placed state, step with accumulation, loop that survives preemption."""

from subspace_jax.training._fit import fit as fit
from subspace_jax.training._hosts import initialize_distributed as initialize_distributed
from subspace_jax.training._mesh import make_mesh as make_mesh
from subspace_jax.training._mesh import shard_batch as shard_batch
from subspace_jax.training._packing import PackedRows as PackedRows
from subspace_jax.training._packing import pack_sequences as pack_sequences
from subspace_jax.training._scan import ScanResult as ScanResult
from subspace_jax.training._scan import scan_steps as scan_steps
from subspace_jax.training._state import TrainState as TrainState
from subspace_jax.training._state import init_train_state as init_train_state
from subspace_jax.training._step import TrainStep as TrainStep
from subspace_jax.training._step import make_train_step as make_train_step
from subspace_jax.training._token_loss import chunked_token_loss as chunked_token_loss
from subspace_jax.training._token_loss import token_loss as token_loss

__all__ = [
    "PackedRows",
    "ScanResult",
    "TrainState",
    "TrainStep",
    "chunked_token_loss",
    "fit",
    "init_train_state",
    "initialize_distributed",
    "make_mesh",
    "make_train_step",
    "pack_sequences",
    "scan_steps",
    "shard_batch",
    "token_loss",
]
