"""What a training did to a model's weights: as data, as a table, as pictures, and as one HTML file."""

from subspace_jax.reports._report import MatrixChange as MatrixChange
from subspace_jax.reports._report import Report as Report
from subspace_jax.reports._report import report as report

__all__ = ["MatrixChange", "Report", "report"]
