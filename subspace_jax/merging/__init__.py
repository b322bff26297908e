"""Merges several experts of one base model into one: the usual mergers, and what others are made of."""

from subspace_jax.merging._change import Change as Change
from subspace_jax.merging._change import Deferred as Deferred
from subspace_jax.merging._change import Dense as Dense
from subspace_jax.merging._change import Factored as Factored
from subspace_jax.merging._change import Form as Form
from subspace_jax.merging._change import check_base as check_base
from subspace_jax.merging._change import formed as formed
from subspace_jax.merging._change import read_change as read_change
from subspace_jax.merging._change import register_form as register_form
from subspace_jax.merging._change import wide_array as wide_array
from subspace_jax.merging._dare import Merger as Merger
from subspace_jax.merging._dare import dare as dare
from subspace_jax.merging._dare import with_changes as with_changes
from subspace_jax.merging._knots import knots as knots
from subspace_jax.merging._largest import kth_magnitude as kth_magnitude
from subspace_jax.merging._linear import average as average
from subspace_jax.merging._linear import check_weights as check_weights
from subspace_jax.merging._linear import concatenated as concatenated
from subspace_jax.merging._linear import linear as linear
from subspace_jax.merging._linear import mean as mean
from subspace_jax.merging._linear import task_arithmetic as task_arithmetic
from subspace_jax.merging._site import Site as Site
from subspace_jax.merging._slerp import slerp as slerp
from subspace_jax.merging._spectral import iso_c as iso_c
from subspace_jax.merging._spectral import tsv_m as tsv_m
from subspace_jax.merging._statistics import fisher as fisher
from subspace_jax.merging._statistics import regmean as regmean
from subspace_jax.merging._thin import Thin as Thin
from subspace_jax.merging._thin import thin_svd as thin_svd
from subspace_jax.merging._ties import ties as ties
from subspace_jax.merging._to_low_rank import to_low_rank as to_low_rank
from subspace_jax.merging._walk import Selector as Selector
from subspace_jax.merging._walk import low_rank as low_rank
from subspace_jax.merging._walk import merge_leaves as merge_leaves
from subspace_jax.merging._walk import sites as sites
from subspace_jax.merging._walk import write as write

__all__ = [
    "Change",
    "Deferred",
    "Dense",
    "Factored",
    "Form",
    "Merger",
    "Selector",
    "Site",
    "Thin",
    "average",
    "check_base",
    "check_weights",
    "concatenated",
    "dare",
    "fisher",
    "formed",
    "iso_c",
    "knots",
    "kth_magnitude",
    "linear",
    "low_rank",
    "mean",
    "merge_leaves",
    "read_change",
    "register_form",
    "regmean",
    "sites",
    "slerp",
    "task_arithmetic",
    "thin_svd",
    "ties",
    "to_low_rank",
    "tsv_m",
    "wide_array",
    "with_changes",
    "write",
]
