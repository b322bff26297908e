"""Continual learning: learners, the loop over a stream of tasks, and its scores."""

from subspace_jax.continual._learner import Learner as Learner
from subspace_jax.continual._learner import LearnerState as LearnerState
from subspace_jax.continual._learner import Loss as Loss
from subspace_jax.continual._learner import Selector as Selector
from subspace_jax.continual._learner import StreamError as StreamError
from subspace_jax.continual._learner import check_tasks as check_tasks
from subspace_jax.continual._learner import init_opt_state as init_opt_state
from subspace_jax.continual._learner import rules_of as rules_of
from subspace_jax.continual._make_learner import make_learner as make_learner
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
    "check_tasks",
    "init_opt_state",
    "joint_learner",
    "make_learner",
    "rules_of",
    "run_stream",
    "sequential_learner",
    "stream_scores",
]
