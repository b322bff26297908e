"""Learning task after task without forgetting: what to remember of each, and what to keep free of it."""

from subspace_jax.continual._learner import Learner as Learner
from subspace_jax.continual._learner import LearnerState as LearnerState
from subspace_jax.continual._learner import Loss as Loss
from subspace_jax.continual._learner import Selector as Selector
from subspace_jax.continual._learner import StreamError as StreamError
from subspace_jax.continual._learner import adapted_of as adapted_of
from subspace_jax.continual._learner import check_end as check_end
from subspace_jax.continual._learner import check_start as check_start
from subspace_jax.continual._learner import check_tasks as check_tasks
from subspace_jax.continual._learner import end_state as end_state
from subspace_jax.continual._learner import init_opt_state as init_opt_state
from subspace_jax.continual._learner import initial_state as initial_state
from subspace_jax.continual._learner import make_step as make_step
from subspace_jax.continual._learner import rules_of as rules_of
from subspace_jax.continual._scores import StreamScores as StreamScores
from subspace_jax.continual._scores import stream_scores as stream_scores
from subspace_jax.continual._sequential import joint_learner as joint_learner
from subspace_jax.continual._sequential import sequential_learner as sequential_learner
from subspace_jax.continual._stream import StreamCheckpointer as StreamCheckpointer
from subspace_jax.continual._stream import StreamResult as StreamResult
from subspace_jax.continual._stream import StreamTask as StreamTask
from subspace_jax.continual._stream import run_stream as run_stream

__all__ = [
    "Learner",
    "LearnerState",
    "Loss",
    "Selector",
    "StreamCheckpointer",
    "StreamError",
    "StreamResult",
    "StreamScores",
    "StreamTask",
    "adapted_of",
    "check_end",
    "check_start",
    "check_tasks",
    "end_state",
    "init_opt_state",
    "initial_state",
    "joint_learner",
    "make_step",
    "rules_of",
    "run_stream",
    "sequential_learner",
    "stream_scores",
]
