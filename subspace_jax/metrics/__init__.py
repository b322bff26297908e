"""Scores that compare methods over ranks, tasks and representations."""

from subspace_jax.metrics._aurac import aurac as aurac
from subspace_jax.metrics._clustering import clustering_accuracy as clustering_accuracy
from subspace_jax.metrics._continual import MultiDomainScores as MultiDomainScores
from subspace_jax.metrics._continual import accuracy_curve as accuracy_curve
from subspace_jax.metrics._continual import average_accuracy as average_accuracy
from subspace_jax.metrics._continual import backward_transfer as backward_transfer
from subspace_jax.metrics._continual import forgetting as forgetting
from subspace_jax.metrics._continual import forward_transfer as forward_transfer
from subspace_jax.metrics._continual import incremental_accuracy as incremental_accuracy
from subspace_jax.metrics._continual import intransigence as intransigence
from subspace_jax.metrics._continual import learning_accuracy as learning_accuracy
from subspace_jax.metrics._continual import multi_domain_scores as multi_domain_scores
from subspace_jax.metrics._continual import normalized_accuracy as normalized_accuracy
from subspace_jax.metrics._detection import aupro as aupro
from subspace_jax.metrics._detection import auroc as auroc
from subspace_jax.metrics._detection import f1_max as f1_max
from subspace_jax.metrics._retrieval import RetrievalScores as RetrievalScores
from subspace_jax.metrics._retrieval import class_means as class_means
from subspace_jax.metrics._retrieval import retrieval_scores as retrieval_scores

__all__ = [
    "MultiDomainScores",
    "RetrievalScores",
    "accuracy_curve",
    "aupro",
    "aurac",
    "auroc",
    "average_accuracy",
    "backward_transfer",
    "class_means",
    "clustering_accuracy",
    "f1_max",
    "forgetting",
    "forward_transfer",
    "incremental_accuracy",
    "intransigence",
    "learning_accuracy",
    "multi_domain_scores",
    "normalized_accuracy",
    "retrieval_scores",
]
