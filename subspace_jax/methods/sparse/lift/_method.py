"""`lift`: selects principal entries."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from subspace_jax.core import Method, Role, RoleError, check_choice, check_int, check_rank, require_matrix
from subspace_jax.linalg import randomized_svd, truncated_svd, wide_dtype
from subspace_jax.weights import SparseBlocks, SparseDelta, entries_at, in_blocks, largest_entries


def lift(
    rank: int = 128,
    *,
    filter_rank: int,
    svd: Literal["exact", "randomized"] = "exact",
    iterations: int = 4,
    blocks: tuple[int, int] = (1, 1),
    keep_formed: bool = False,
) -> Method:
    r"""Trains the entries of a weight that are largest in its best low-rank approximation.

    With \(W_r = U_r\,\mathrm{diag}(s_r)\,V_r^T\), the \(k = \min(B\,(d_{in} + d_{out}),\; d_{in} d_{out})\) entries
    of largest \(|W_r|\) learn; of equal ones those that come first row by row. Every stacked layer has its own.

    Select the linear layers inside the blocks (queries, keys, values, outputs and the feed-forward ones; the
    latter alone is a variant of the paper); embeddings, the head, norms and biases stay frozen. Train with
    `lift_adam`, and every few hundred steps call `reselect_principal`, which selects anew from what was learned.

    Args:
      rank: \(B\), the budget as the rank of a LoRA of equal size.
      filter_rank: \(r\), the rank of the fit, cut off at the weight's smaller side, where the fit is the weight.
        Published (model: B, r, steps between selections): mathematics with LLaMA-3.2-1B: 128, 32, 400; 3.2-3B: 128,
        64, 10; 2-7B: 128, 64, 400; 3-8B: 128, 128, 400; commonsense with 2-7B: 128, 64, 2000; 3-8B: 32, 16, 2000.
      svd: "exact", or "randomized" with a sketch of \(\min(2r, d_{in}, d_{out})\) columns.
      iterations: power iterations of the randomized decomposition.
      blocks: of this library: cuts the matrix into `(rows, cols)` equal blocks, of which each trains its own
        \(\lceil k / (rows \cdot cols) \rceil\) largest entries. That is another selection than the published one, which
        \((1, 1)\) is. On a mesh choose over how many devices the weight's inputs and outputs are split: then a step
        sends nothing for the entries, where one list costs 8 bytes of each entry per use. Measured on the data of
        `python -m experiments run lift` (64 x 64, 20 seeds), loss left: 19.1 % with one block, 18.8, 19.4, 21.0 and
        22.0 with 2, 4, 8 and 16 blocks each way, 23.8 for the largest entries of W.
      keep_formed: give True where the model is rematerialized; see `SparseDelta`.

    Returns:
      A method whose weights are `SparseDelta` with values `[*stack, k]` that replace entries, or, in blocks,
      `SparseBlocks` with values `[*stack, rows, cols, k]`.

    Raises:
      RankError: a rank or a number of blocks is not a positive integer.
      ValueError: another option is not one of those above.
      RoleError: the blocks do not divide the weight; raised by `adapt`, with the path.

    Warning:
      Where the singular values \(s_r\) and \(s_{r+1}\) are equal the fit is not unique, and neither is the selection.
      The released optimizer takes the largest entries only if its mask type says so in a word that the released
      scripts leave out; this function does what the paper says.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> w = jnp.outer(jnp.array([1.0, -5.0, 2.0]), jnp.array([3.0, 1.0, 0.1, 0.1]))
      >>> adapted = sj.adapt({"w": w}, {"w": sj.lift(rank=1, filter_rank=1)}, key=jax.random.key(0))
      >>> adapted["w"].indices.tolist(), bool(jnp.all(sj.merge(adapted)["w"] == w))
      ([0, 1, 4, 5, 6, 8, 9], True)
    """
    rank = check_rank(rank, what="lift: rank")
    filter_rank = check_rank(filter_rank, what="lift: filter_rank")
    check_choice("lift: svd", svd, ("exact", "randomized"))
    iterations = check_int("lift: iterations", iterations, least=0)
    if not isinstance(blocks, (tuple, list)) or len(blocks) != 2:
        raise ValueError(f"lift: blocks={blocks!r}: expected two positive ints, (rows, cols).")
    rows, cols = (check_int("lift: an entry of blocks", n) for n in blocks)

    def make(key: jax.Array, array: jax.Array, role: Role, stats: Any) -> SparseDelta:
        del stats
        require_matrix(array, role)
        inputs, outputs = role.sizes(array.shape)
        # At the smaller side the fit is the weight itself, and beyond it too.
        fitted = min(filter_rank, inputs, outputs)
        if inputs % rows or outputs % cols:
            raise RoleError(
                f"blocks={blocks} do not divide a matrix of {inputs} inputs and {outputs} outputs; give numbers that "
                "do, by a rule of its own for this weight if need be."
            )
        matrix = role.matrix(array).astype(wide_dtype(array.dtype))
        if svd == "randomized":
            factors = randomized_svd(key, matrix, fitted, iterations=iterations, oversample=fitted)
        else:
            factors = truncated_svd(matrix, fitted)
        fit = jnp.matmul(factors.u * factors.s[..., None, :], factors.vt, precision=jax.lax.Precision.HIGHEST)
        count = min(rank * (inputs + outputs), inputs * outputs)
        whole = rows * cols == 1
        scores = jnp.abs(fit) if whole else in_blocks(jnp.abs(fit), rows, cols)
        indices = largest_entries(scores, -(-count // (rows * cols)), axes=2)
        return (SparseDelta if whole else SparseBlocks)(
            base=array,
            indices=indices,
            values=entries_at(array, indices, role).astype(wide_dtype(array.dtype)),
            keep_formed=keep_formed,
            role=role,
            dtype=array.dtype,
            trainable=("values",),
        )

    return Method("lift", make)
