"""Every method that makes stand-in weights: a new method adds one line to `METHODS`."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import subspace_jax as sj
from subspace_jax.core import Leaf, Statistics
from subspace_jax.methods.low_rank.block_lora import block_lora
from subspace_jax.methods.low_rank.comp_lora import comp_lora, confine
from subspace_jax.methods.low_rank.orthogonal_adaptation import orthogonal_adaptation

from .kernels import KERNELS, make_inputs, make_params, model


@dataclasses.dataclass(frozen=True)
class Case:
    """A method under test.

    Attributes:
      name: name in the test's id.
      factory: makes the method of a rank.
      start: how far the merged weight may be from the array at the start, relative to the array's largest entry;
        0 for bitwise equality.
      refuses: kinds of kernel that the method refuses with an error of the library's own.
      whole: tried on all kinds of kernel and inside every transform, and trained on 8 devices: one setting of each
        parameterization. The others share its code there, so they are tried on `FEW` kernels: what a method's own
        start, or another route of a parameterization, can get wrong.
    """

    name: str
    factory: Callable[[int], sj.Method]
    start: float = 0.0
    refuses: tuple[str, ...] = ()
    whole: bool = False

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names of the kernels that it is tried on."""
        return tuple(name for name in (KERNELS if self.whole else FEW) if name not in self.refuses)


FEW = ("wide", "heads_in", "conv_strided", "tied", "stacked", "bfloat16")

METHODS = (
    Case("full", lambda rank: sj.full(), whole=True),
    Case("lora", lambda rank: sj.lora(rank, alpha=3.0, dropout=0.3), whole=True),
    Case("lemon_lora", lambda rank: sj.methods.lemon.lemon_lora(rank, 2.0)),
    Case("rslora", lambda rank: sj.lora(rank, alpha=3.0, rank_stabilized=True)),
    Case("pissa", lambda rank: sj.pissa(rank), start=1e-5),
    Case("pissa_exact", lambda rank: sj.pissa(rank, alpha=3.0, svd="exact"), start=1e-5),
    Case("qpissa", lambda rank: sj.qpissa(rank, steps=2), start=0.3, whole=True),
    Case("qlora", lambda rank: sj.qlora(rank), start=0.3),
    Case("dora_lora", lambda rank: sj.dora(sj.lora(rank)), start=1e-6, whole=True),
    Case("dora_pissa", lambda rank: sj.dora(sj.pissa(rank)), start=1e-5),
    Case("dora_exact", lambda rank: sj.dora(sj.lora(rank, alpha=3.0), norm="exact"), start=1e-6),
    Case("matryoshka", lambda rank: sj.matryoshka(sj.lora(rank, dropout=0.3), rank_scale="sqrt"), whole=True),
    Case("dora_matryoshka", lambda rank: sj.dora(sj.matryoshka(sj.lora(rank))), start=1e-6),
    Case(
        "flora", lambda rank: sj.flora(rank, window_ranks=(2, 1), dropout=0.3, factor_init="kaiming_fan_in"), whole=True
    ),
    Case("ssf", lambda rank: sj.ssf(std=0.0)._replace(plan=None), whole=True),
    Case("oft", lambda rank: sj.oft(None, blocks=1), whole=True),
    Case("oft_series", lambda rank: sj.oft(None, blocks=1, terms=5, magnitude=True)),
    Case("svfit", lambda rank: sj.svfit(rank), start=1e-5, whole=True),
    Case("svfit_formed", lambda rank: sj.svfit(rank, route="materialized"), start=1e-5),
    Case("osf", lambda rank: sj.osf(0.5), start=1e-5, whole=True),
    Case("osf_common", lambda rank: sj.osf(0.5, width="common", route="factored"), start=1e-5),
    Case("lift", lambda rank: sj.lift(rank, filter_rank=rank), whole=True),
    Case("lift_blocks", lambda rank: sj.lift(rank, filter_rank=rank, blocks=(2, 1)), whole=True),
    Case("s2ft_in", lambda rank: sj.s2ft(0.5), refuses=("conv_strided", "conv_dilated", "conv_grouped"), whole=True),
    Case("s2ft_out", lambda rank: sj.s2ft(0.5, side="out", parameterization="in_place"), whole=True),
    Case("sara", lambda _: sj.methods.sara.sara(0.3, slots=60)),
    Case("spt", lambda rank: _sensitive(sj.methods.spt.spt, rank, alpha=10.0), whole=True),
    Case("spt_entries", lambda rank: _sensitive(sj.methods.spt.spt, rank, alpha=1e-9)),
    Case("snell", lambda rank: sj.methods.snell.snell(2 * rank, sparsity=0.4), start=2e-2, whole=True),
    Case("snell_rbf", lambda rank: _snell(rank, sparsity=0.3, kernel="rbf", rule="hard", pieces=1), start=3.0),
    # All that is its own is the kernel matrix; the rest is the weight of snell.
    Case("snella", lambda rank: sj.methods.snella.snella(2 * rank, sparsity=0.3), start=1e-1),
    Case("composable_sft", lambda rank: _chosen(sj.methods.composable_sft.composable_sft, 5 * rank)),
    Case("loldu", lambda rank: sj.loldu(rank, sigma=0.5), start=1e-5),
    Case("loldu_whole", lambda _: sj.loldu(), start=1e-5),
    Case("corda", lambda rank: _with_gram(sj.corda(rank, alpha=3.0)), start=1e-5),
    Case("corda_kept", lambda rank: _with_gram(sj.corda(rank, mode="kpm", balanced=True)), start=1e-5),
    # Without the plan every weight holds its own bases, and can be looked at alone; `test_composition.py` shares them.
    Case("randlora", lambda rank: sj.randlora(rank)._replace(plan=None), whole=True),
    Case(
        "randlora_peft",
        lambda rank: sj.randlora(rank, scaling="peft", basis="sparse", pairing="peft", route="factored")._replace(
            plan=None
        ),
    ),
    Case("lora_xs", lambda rank: sj.methods.lora_sb.lora_xs(rank, alpha=3.0), start=1e-3),
    Case("lora_sb", lambda rank: _with_gradient(sj.lora_sb(rank, learning_rate=1e-3, alpha=3.0)), start=1e-1),
    Case("soka", lambda rank: sj.soka(rank), start=1e-5, whole=True),
    Case("orthogonal_adaptation", lambda rank: orthogonal_adaptation(rank, concept=0, dropout=0.3), whole=True),
    Case("block_lora", lambda rank: block_lora(2 * rank, dropout=0.3, arm_dropout=0.2), whole=True),
    Case("dora_block_lora", lambda rank: sj.dora(block_lora(2 * rank)), start=1e-6),
    Case("comp_lora", lambda rank: comp_lora(rank, protect=1, dropout=0.3), whole=True),
    Case("comp_o_lora", lambda rank: confine(sj.o_lora(rank, tasks=2), protect=1)),
    Case("pego", lambda rank: sj.methods.pego.pego(rank, modules=2)),
    Case("o_lora", lambda rank: sj.o_lora(rank, tasks=2, alpha=3.0)),
    Case("loca", lambda rank: sj.loca(5 * rank, alpha=0.5), whole=True),
    Case("loca_transformed", lambda rank: sj.loca(5 * rank, evaluation="fast")),
)

# Of these every check is made, inside every transform too. They come first of all, for pytest keeps together what has
# the same place: all checks of a method, which share what they compile.
PARAMETERIZATIONS = tuple(case for case in METHODS if case.whole)
METHODS = (*PARAMETERIZATIONS, *(case for case in METHODS if not case.whole))

# What is tried on 8 devices: every parameterization trains a step, and these start there with arrays that are split.
STARTS = ("pissa", "loldu", "loldu_whole", "corda", "lora_xs", "lora_sb", "o_lora")
# Blocks of entries have a program of their own, tests/sharded.py: here a block would be cut.
SHARDED = tuple(c for c in METHODS if (c.whole and c.name != "lift_blocks") or c.name in STARTS)


def _with_gradient(method: sj.Method) -> sj.Method:
    """A method that needs gradients, given some."""

    def init(key, array, role, stats):
        gradient = jax.random.normal(jax.random.key(7), array.shape, jnp.float32)
        return method.init(key, array, role, Statistics(gradient=gradient))

    return sj.Method(method.name, init)


def _sensitive(method: Any, rank: int, alpha: float) -> sj.Method:
    """SPT with some gradient in place of a captured one; a battery decides leaf by leaf."""

    def init(key, array, role, stats):
        square = np.random.default_rng(9).random(array.shape)
        stats = {"w": Statistics(squared_gradient=square.astype(np.float32))}
        options = {"roles": {"w": role}, "rank": rank, "step": 1, "alpha": alpha}
        total = rank * sum(role.sizes(array.shape)) * int(np.prod(role.stack_shape(array.shape)))
        found = sj.methods.spt.allocate(stats, total if alpha > 1 else 9, **options)
        make = method(found, dropout=0.3).plan(key, {"w": Leaf(array, role)})["w"]
        return make(key, array, role, None)

    return sj.Method("spt", init)


def _chosen(method: Any, count: int) -> sj.Method:
    """Composable fine-tuning of some entries in place of those that training changed; leaf by leaf."""

    def init(key, array, role, stats):
        scores = {"w": np.random.default_rng(9).random(array.shape)}
        selection = sj.methods.composable_sft.Selection(sj.weights.largest_of_all(scores, count))
        return method(selection).plan(key, {"w": Leaf(array, role)})["w"](key, array, role, None)

    return sj.Method("composable_sft", init)


def _snell(rank: int, **options: Any) -> sj.Method:
    return sj.methods.snell.snell(rank, **options)


def _with_gram(method: sj.Method) -> sj.Method:
    """A method that needs the Gram matrix of inputs, given one."""

    def init(key, array, role, stats):
        size, _ = role.sizes(array.shape)
        rows = jax.random.normal(jax.random.key(8), (*role.stack_shape(array.shape), 3 * size, size), jnp.float32)
        return method.init(key, array, role, Statistics(gram=jnp.swapaxes(rows, -1, -2) @ rows))

    return sj.Method(method.name, init)


def supported(case: Case) -> dict[str, jax.Array]:
    """Returns the parameters of the kernels that the method serves."""
    return {name: w for name, w in make_params().items() if name in case.kernels}


@functools.cache
def roles() -> dict[str, sj.Role]:
    """Returns how the model uses every kernel."""
    return sj.roles(model, make_params(), make_inputs())


def adapt(case: Case, params: dict[str, jax.Array], seed: int = 0) -> Any:
    """Returns the tree with a stand-in of the method in every array's place."""
    rules = {name: case.factory(KERNELS[name].rank) for name in params}
    return sj.adapt(params, rules, key=jax.random.key(seed), roles={name: roles()[name] for name in params})


@functools.cache
def fresh(case: Case) -> Any:
    """Returns the adapted tree as the method starts."""
    return adapt(case, supported(case))


def move(adapted: Any, seed: int = 0) -> Any:
    """Returns the tree with every trainable entry moved, as if trained."""
    rng = np.random.default_rng(seed)
    trainable, frozen = sj.partition(adapted)
    moved = jax.tree.map(
        lambda v: jnp.asarray(np.asarray(v) + (0.1 * rng.normal(size=v.shape)).astype(v.dtype)), trainable
    )
    return sj.combine(moved, frozen)


@functools.cache
def trained(case: Case, seed: int = 0) -> Any:
    """Returns the adapted tree after a change of everything that learns."""
    return move(fresh(case), seed)
