"""Operations of the matrix products that a training step cannot do without, method by method.

A product of n rows with a kernel of K entries has 2 n K operations. A frozen kernel takes part in two, forward and for
the gradient of its input; the second falls away where nothing below it learns. Normalizations, softmax, GELU and the
optimizer are left out: the compiler counts about half a hundredth to four for them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from subspace_jax.linalg import transform_share


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel and how it is used.

    Attributes:
      inputs: input size.
      outputs: output size.
      rows: rows that it multiplies.
      below: 1.0 if something below it learns, so that the gradient of its input is needed, 0.0 if not.
    """

    inputs: int
    outputs: int
    rows: int
    below: float

    @property
    def product(self) -> float:
        """Operations of one product with the kernel."""
        return 2.0 * self.rows * self.inputs * self.outputs

    @property
    def frozen(self) -> float:
        """Operations of the kernel alone."""
        return self.product * (1.0 + self.below)

    def factor(self, size: int, rank: int) -> float:
        """Operations of the rows with a factor of `size` by `rank`."""
        return 2.0 * self.rows * size * rank


Products = Callable[[Kernel], float]


def full(kernel: Kernel) -> float:
    """Forward, gradient of the input, gradient of the kernel."""
    return kernel.frozen + kernel.product


def lora(rank: int) -> Products:
    """Two factors, each with forward, input gradient and own gradient."""
    return lambda k: k.frozen + 3 * k.factor(k.outputs, rank) + (2 + k.below) * k.factor(k.inputs, rank)


def output_factor(rank: int) -> Products:
    """LoRA whose factor of the inputs is frozen, and has no gradient of its own."""
    return lambda k: k.frozen + (2 + k.below) * k.factor(k.outputs, rank) + (1 + k.below) * k.factor(k.inputs, rank)


def pego(rank: int, modules: int) -> Products:
    """A group of LoRAs with its penalty: products of the group with the kernel, and of outputs by outputs."""

    def count(k: Kernel) -> float:
        pairs, together = modules * (modules - 1) // 2, modules * rank
        # With the kernel and each other's factors, forward and backward to the factors.
        small = 2 * 2.0 * k.inputs * k.outputs * together + 3 * 2.0 * pairs * k.inputs * rank**2
        small += 3 * 2.0 * pairs * k.outputs * rank**2
        return lora(together)(k) + small + 3 * 2.0 * (modules + pairs) * k.outputs**2 * rank

    return count


def complement(rank: int, protected: int) -> Products:
    """LoRA whose factors are projected off so many directions of either side, forward and backward."""
    return lambda k: lora(rank)(k) + 2 * 2 * 2.0 * protected * rank * (k.inputs + k.outputs)


def dora(rank: int) -> Products:
    """LoRA, and the cross term of the squared lengths of columns, which are not differentiated."""
    return lambda k: lora(rank)(k) + 2.0 * k.inputs * k.outputs * rank


def core(rank: int) -> Products:
    """Frozen factors around a core that learns."""
    return lambda k: (
        k.frozen + 2 * k.factor(k.outputs, rank) + (1 + k.below) * k.factor(k.inputs, rank) + 3 * k.factor(rank, rank)
    )


def tucker(rank: int) -> Products:
    """A core between factors, all of which learn."""
    return lambda k: lora(rank)(k) + 3 * k.factor(rank, rank)


def diagonal(rank: int) -> Products:
    """A diagonal between frozen factors, multiplied or formed, whichever is less.

    Below full rank the frozen rest of the kernel stands beside it; at full rank nothing is left over.
    """

    def count(k: Kernel) -> float:
        complete = rank >= min(k.inputs, k.outputs)
        factors = 2 * k.factor(k.outputs, rank) + (1 + k.below) * k.factor(k.inputs, rank)
        formed = full(k) + 2 * 2.0 * rank * k.inputs * k.outputs
        return min(factors if complete else k.frozen + factors, formed)

    return count


def random_bases(rank: int) -> Products:
    """RandLoRA's bases of together at least full rank, multiplied or formed, whichever is less."""

    def count(k: Kernel) -> float:
        small, large = min(k.inputs, k.outputs), max(k.inputs, k.outputs)
        number = -(-small // rank)
        multiplied = k.frozen + k.rows * number * rank * (4.0 * large + 6.0 * small)
        formed = full(k) + 4.0 * number * rank * k.inputs * k.outputs
        return min(multiplied, formed)

    return count


def rotation(block: int) -> Products:
    """Blocks that rotate the inputs: the kernel's input gradient is always needed."""
    return lambda k: 2 * k.product + (2 + k.below) * k.factor(k.inputs, block)


def cosine(k: Kernel) -> float:
    """LoCA: the formed kernel, with two folded transforms forward and two backward."""
    return full(k) + 4.0 * k.inputs * k.outputs * sum(n * transform_share(n) for n in (k.inputs, k.outputs))


def kernelized(rank: int) -> Products:
    """A formed kernel with the products of two factors in it, made twice, and the gradients of both."""
    return lambda k: full(k) + 4 * 2.0 * rank * k.inputs * k.outputs


def routed(rank: int, atoms: int) -> Products:
    """LoRA with every row's product with every atom, forward and two backward; the router itself is left out."""
    return lambda k: lora(rank)(k) + 3 * atoms * k.factor(rank, rank)


def elementwise(kernel: Kernel) -> float:
    """What learns takes no product."""
    return kernel.frozen


def transformer(
    sizes: Mapping[str, int], rows: int, length: int, products: Products, adapted: Callable[[str], bool]
) -> float:
    """Returns the operations of a step of the benchmark's transformer.

    Args:
      sizes: `width`, `mlp_width`, `layers` and `vocabulary`.
      rows: tokens of the batch.
      length: tokens of a sequence.
      products: what an adapted kernel takes; the others are frozen.
      adapted: of a kernel's name, whether it is adapted.
    """
    width, hidden = sizes["width"], sizes["mlp_width"]
    shapes = {
        **dict.fromkeys(("query", "key", "value", "out"), (width, width)),
        "mlp_in": (width, hidden),
        "mlp_out": (hidden, width),
    }
    total = 0.0
    for layer in range(sizes["layers"]):
        for name, (inputs, outputs) in shapes.items():
            # The embedding is frozen: nothing below the first layer's projections learns.
            first = layer == 0 and name in ("query", "key", "value")
            kernel = Kernel(inputs, outputs, rows, 0.0 if first else 1.0)
            total += products(kernel) if adapted(name) else kernel.frozen
        # Scores and their use, each a product forward and two backward.
        total += 3 * 2 * 2.0 * rows * length * width
    head = Kernel(width, sizes["vocabulary"], rows, 1.0)
    return total + (products(head) if adapted("head") else head.frozen)
