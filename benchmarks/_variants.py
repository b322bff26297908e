"""Ways to fine-tune one model: this library's, full fine-tuning, and other libraries' LoRA."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import subspace_jax as sj
from benchmarks._models import ModelConfig, NNXTransformer, Plain, cross_entropy, linen, make, nnx_twin

KERNELS = "**/kernel"


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to fine-tune.

    Attributes:
      name: what tables call it.
      forward: `forward(learned, fixed, tokens)`, logits.
      learned: tree that is differentiated.
      fixed: tree that is not.
      note: what a reader has to know about it.
      baseline: name of the variant that it is divided by.
      freeze: tree of booleans over `learned`, True where `optax.masked` throws the update away.
      own: the method's own optimizer, in place of Adam.
      penalty: a term of the loss, of the whole adapted tree.
    """

    name: str
    forward: Callable[[Any, Any, jax.Array], jax.Array]
    learned: Any
    fixed: Any = None
    note: str = ""
    baseline: str = "full"
    freeze: Any = None
    own: optax.GradientTransformation | None = None
    penalty: Callable[[Any], jax.Array] | None = None

    def optimizer(self, *, bare: bool = False) -> optax.GradientTransformation:
        """Returns Adam after a global-norm clip, as the README shows it; Adam alone if `bare`."""
        clip = optax.identity() if bare else optax.clip_by_global_norm(1.0)
        if self.freeze is None:
            return optax.chain(clip, self.own or optax.adam(1e-4))
        learns = jax.tree.map(lambda frozen: not frozen, self.freeze)
        return optax.chain(clip, optax.masked(optax.adam(1e-4), learns), optax.masked(optax.set_to_zero(), self.freeze))

    @property
    def trainable_values(self) -> int:
        """Number of values that an update can change."""
        kept = self.learned
        if self.freeze is not None:
            kept = jax.tree.map(lambda v, frozen: None if frozen else v, kept, self.freeze)
        return sum(leaf.size for leaf in jax.tree.leaves(kept))

    def step(self, *, bare: bool = False) -> Callable[..., Any]:
        """Returns one training step.

        Args:
          bare: leave out the global-norm clip and the logged gradient norm.

        Returns:
          `step(learned, state, fixed, tokens)`: new `learned` and `state`, loss, gradient norm.
        """
        optimizer = self.optimizer(bare=bare)

        def step(learned: Any, state: Any, fixed: Any, tokens: jax.Array):
            def loss(learned: Any) -> jax.Array:
                value = cross_entropy(self.forward(learned, fixed, tokens), tokens)
                return value if self.penalty is None else value + self.penalty(sj.combine(learned, fixed))

            value, gradients = jax.value_and_grad(loss)(learned)
            updates, state = optimizer.update(gradients, state, learned)
            norm = jnp.zeros(()) if bare else optax.global_norm(gradients)
            return optax.apply_updates(learned, updates), state, value, norm

        return step


def full(plain: Plain, name: str = "full", note: str = "") -> Variant:
    """Every parameter learns."""
    return Variant(name, lambda learned, _, tokens: plain.apply(learned, tokens), plain.params, None, note, name)


def adapted_tree(plain: Plain, method: sj.Method, tokens: Any, abstract: bool) -> Any:
    """The model's parameters with `method` on all kernels."""
    roles = sj.roles(plain.apply, plain.params, tokens)

    def build(params: Any) -> Any:
        return sj.adapt(params, {KERNELS: method}, key=jax.random.key(1), roles=roles)

    return jax.eval_shape(build, plain.params) if abstract else build(plain.params)


def of_tree(plain: Plain, adapted: Any, name: str, baseline: str, **others: Any) -> Variant:
    """Returns this library's way to train an adapted tree, as the README shows it; `others` are fields of `Variant`."""
    trainable, frozen = sj.partition(adapted)
    apply = sj.with_adapters(plain.apply)

    def forward(learned: Any, fixed: Any, tokens: jax.Array) -> jax.Array:
        return apply(sj.combine(learned, fixed), tokens)

    return Variant(name, forward, trainable, frozen, baseline=baseline, **others)


def ours(plain: Plain, method: sj.Method, tokens: Any, name: str, baseline: str, abstract: bool) -> Variant:
    """This library with one method on all kernels."""
    return of_tree(plain, adapted_tree(plain, method, tokens, abstract), name, baseline)


def materialized(plain: Plain, rank: int, tokens: Any, abstract: bool) -> Variant:
    """LoRA that forms W + a b in the step, as many small libraries do."""
    trainable, frozen = sj.partition(adapted_tree(plain, sj.lora(rank), tokens, abstract))

    def forward(learned: Any, fixed: Any, tokens: jax.Array) -> jax.Array:
        return plain.apply(sj.merge(sj.combine(learned, fixed)), tokens)

    return Variant("materialized", forward, trainable, frozen, "W + a b formed in the step")


def masked(plain: Plain, rank: int, tokens: Any, abstract: bool) -> Variant:
    """The trap: everything is differentiated, and `optax.masked` freezes afterwards."""

    def open_up(weight: Any) -> Any:
        return dataclasses.replace(weight, trainable=weight.data_names()) if sj.core.is_weight(weight) else weight

    tree = adapted_tree(plain, sj.lora(rank), tokens, abstract)
    tree = jax.tree.map(open_up, tree, is_leaf=sj.core.is_weight)

    def frozen(path: tuple[Any, ...], _: Any) -> bool:
        return getattr(path[-1], "name", "") not in ("a", "b")

    apply = sj.with_adapters(plain.apply)
    return Variant(
        "optax.masked",
        lambda learned, _, tokens: apply(learned, tokens),
        tree,
        note="everything differentiated, frozen by optax.masked after the clip",
        freeze=jax.tree_util.tree_map_with_path(frozen, tree),
    )


def nnx_lora(config: ModelConfig, rank: int, abstract: bool) -> Variant:
    """`flax.nnx.LoRA` around every `nnx.Linear` of a twin whose attention is made of them."""

    def build() -> NNXTransformer:
        model, rngs = NNXTransformer(config, linear_attention=True, rngs=nnx.Rngs(0)), nnx.Rngs(1)

        def wrap(parent: Any, name: str) -> None:
            base = getattr(parent, name)
            dtypes = {"dtype": config.dtypes["dtype"], "param_dtype": jnp.float32}
            setattr(
                parent,
                name,
                nnx.LoRA(base.in_features, rank, base.out_features, base_module=base, **dtypes, rngs=rngs),
            )

        for layer in model.layers:
            for name in ("query", "key", "value", "out"):
                wrap(layer.attention, name)
            wrap(layer, "mlp_in")
            wrap(layer, "mlp_out")
        wrap(model, "head")
        return model

    graph, _, _ = nnx.split(nnx.eval_shape(build), nnx.LoRAParam, ...)
    learned, fixed = make(lambda: nnx.split(build(), nnx.LoRAParam, ...)[1:], abstract)
    return Variant(
        "nnx.LoRA",
        lambda learned, fixed, tokens: nnx.merge(graph, learned, fixed, copy=True)(tokens),
        learned,
        fixed,
        "attention rewritten with nnx.Linear: nnx.LoRA cannot wrap the LinearGeneral of nnx.MultiHeadAttention",
        "full, NNX",
    )


def qwix_lora(config: ModelConfig, rank: int, tokens: Any, abstract: bool) -> Variant:
    """qwix's LoRA, which intercepts the Linen model's products."""
    import qwix

    from benchmarks._models import LinenTransformer

    provider = qwix.LoraProvider(module_path=".*", rank=rank, alpha=float(rank))
    model: Any = qwix.apply_lora_to_model(LinenTransformer(config), provider)
    zeros = jnp.zeros(tokens.shape, tokens.dtype)
    params = make(lambda: model.init(jax.random.key(0), zeros)["params"], abstract)

    def keep(learns: bool) -> Any:
        def one(path: tuple[Any, ...], leaf: Any) -> Any:
            return leaf if ("_lora_" in str(path[-1])) == learns else None

        return jax.tree_util.tree_map_with_path(one, params)

    return Variant(
        "qwix",
        lambda learned, fixed, tokens: model.apply({"params": sj.combine(learned, fixed)}, tokens),
        keep(True),
        keep(False),
        "only the factors differentiated; adapters in the parameters' dtype",
    )


def variants(
    config: ModelConfig, rank: int, tokens: Any, *, abstract: bool = False, only: tuple[str, ...] = ()
) -> Iterator[Variant | tuple[str, str]]:
    """Yields every way that the layout and the installed packages allow.

    Args:
      config: the model.
      rank: of every adapter.
      tokens: a batch, or its shape.
      abstract: make shapes in place of arrays.
      only: names to make; all if empty.

    Yields:
      A variant, or its name and why there is none.
    """
    base = linen(config, tokens, abstract=abstract)
    entries: dict[str, Callable[[], Variant]] = {
        "full": lambda: full(base),
        "lora": lambda: ours(base, sj.lora(rank), tokens, "lora", "full", abstract),
        "dora": lambda: ours(base, sj.dora(sj.lora(rank)), tokens, "dora", "full", abstract),
        "pissa": lambda: ours(base, sj.pissa(rank), tokens, "pissa", "full", abstract),
        "materialized": lambda: materialized(base, rank, tokens, abstract),
        "optax.masked": lambda: masked(base, rank, tokens, abstract),
        "qwix": lambda: qwix_lora(config, rank, tokens, abstract),
    }
    if not config.scan:
        twin = nnx_twin(config, abstract=abstract)
        entries["full, NNX"] = lambda: full(twin, "full, NNX")
        entries["lora, NNX"] = lambda: ours(twin, sj.lora(rank), tokens, "lora, NNX", "full, NNX", abstract)
        entries["nnx.LoRA"] = lambda: nnx_lora(config, rank, abstract)
    for name, build in entries.items():
        if only and name not in only:
            continue
        try:
            yield build()
        except ImportError as error:
            yield name, f"not installed: {error.name}"
        except Exception as error:
            if name in ("qwix", "nnx.LoRA"):  # another package may not work with this JAX
                yield name, f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
            else:
                raise
