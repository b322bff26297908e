"""Which axis of a convolution kernel has its input features."""

from __future__ import annotations

from subspace_jax.core import Role, RoleError


def feature_place(role: Role) -> int:
    """Returns which of the input axes of a convolution kernel has the input features; the others are its window.

    Args:
      role: of a kernel `[*window, in, out]`, as Flax has it, or `[out, in, *window]`, as PyTorch has it; stacked axes
        may be anywhere.

    Returns:
      A place in `role.in_axes`.

    Raises:
      RoleError: the axes are in another order.

    Example:
      >>> from subspace_jax.core import Role
      >>> feature_place(Role.conv()), feature_place(Role("conv", in_axes=(1, 2, 3), out_axes=(0,)))
      (2, 0)
    """
    (out,) = role.out_axes if len(role.out_axes) == 1 else (None,)
    if out is not None and out > max(role.in_axes):  # [*window, in, out], as in Flax
        return role.in_axes.index(max(role.in_axes))
    if out is not None and out < min(role.in_axes):  # [out, in, *window], as in PyTorch
        return role.in_axes.index(min(role.in_axes))
    raise RoleError(
        f"a convolution kernel with output axes {role.out_axes} among its input axes {role.in_axes}: which has "
        "the input features is not known. Flax has [*window, in, out], PyTorch [out, in, *window]; transpose it."
    )
