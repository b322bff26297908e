"""The equations of the families as trees, "left side minus right side", in time that runs from 0 to 2."""

from __future__ import annotations

from collections.abc import Mapping

from ._symbols import Expression

U, UX, UXX = "u_0", "ux_0", "uxx_0"
Values = Mapping[str, float]


def times(factor: float, leaf: Expression) -> Expression:
    """Returns a product, or the leaf itself where the factor is one."""
    return leaf if factor == 1 else ("mul", float(factor), leaf)


def first(t_final: float) -> Expression:
    """Returns the first time derivative: with time stretched to [0, 2] it carries 2 / t_final."""
    return times(2 / t_final, "ut_0")


def second(t_final: float) -> Expression:
    """Returns the second time derivative, with the square of that factor."""
    return times((2 / t_final) ** 2, "utt_0")


def heat(c: Values, t_final: float) -> Expression:
    """u_t = c u_xx."""
    return ("sub", first(t_final), ("mul", c["c"], UXX))


def porous_medium(c: Values, t_final: float) -> Expression:
    """u_t = (u^m)_xx, expanded: m u^(m-1) u_xx + m (m-1) u^(m-2) u_x^2."""
    m = round(c["m"])
    power = {1: U, 2: ("pow2", U), 3: ("pow3", U)}
    first_part = ("mul", m, ("mul", power[m - 1], UXX))
    slope = ("pow2", UX) if m == 2 else ("mul", power[m - 2], ("pow2", UX))
    return ("sub", first(t_final), ("add", first_part, ("mul", m * (m - 1), slope)))


def klein_gordon(c: Values, t_final: float) -> Expression:
    """u_tt = c^2 u_xx - m^2 c^4 u."""
    spread, mass = c["c"] ** 2, c["m"] ** 2 * c["c"] ** 4
    return ("add", ("sub", second(t_final), ("mul", spread, UXX)), ("mul", mass, U))


def sine_gordon(c: Values, t_final: float) -> Expression:
    """u_tt = u_xx - c sin u."""
    return ("add", ("sub", second(t_final), UXX), ("mul", c["c"], ("sin", U)))


def cahn_hilliard(c: Values, t_final: float) -> Expression:
    """u_t = (u^3 - u)_xx - eps^2 u_xxxx, expanded: (3 u^2 - 1) u_xx + 6 u u_x^2."""
    reaction = ("mul", ("sub", ("mul", 3, ("pow2", U)), 1), UXX)
    whole = ("add", reaction, ("mul", 6, ("mul", U, ("pow2", UX))))
    return ("add", ("sub", first(t_final), whole), ("mul", c["eps"] ** 2, "uxxxx_0"))


def korteweg_de_vries(c: Values, t_final: float) -> Expression:
    """u_t = -u u_x - delta^2 u_xxx."""
    return ("add", first(t_final), ("mul", U, UX), ("mul", c["delta"] ** 2, "uxxx_0"))


def advection(c: Values, t_final: float) -> Expression:
    """u_t = -beta u_x."""
    return ("add", first(t_final), ("mul", c["beta"], UX))


def advection_diffusion(c: Values, t_final: float) -> Expression:
    """u_t = -beta u_x + c u_xx."""
    return ("sub", advection(c, t_final), ("mul", c["c"], UXX))


def dispersion(c: Values, t_final: float) -> Expression:
    """u_t = -a u_xxx."""
    return ("add", first(t_final), ("mul", c["a"], "uxxx_0"))


def wave(c: Values, t_final: float) -> Expression:
    """u_tt = c^2 u_xx."""
    return ("sub", second(t_final), ("mul", c["c"] ** 2, UXX))


_ONE_MINUS_U = ("sub", 1, U)


def reaction(kind: str, c: Values) -> Expression:
    """Returns R(u) of a diffusion-reaction equation.

    Args:
      kind: "logistic", "linear", "bistable" or "square_logistic".
      c: coefficients; the threshold of "bistable" is `a`.
    """
    if kind == "linear":
        return U
    if kind == "logistic":
        return ("mul", U, _ONE_MINUS_U)
    if kind == "bistable":
        return ("mul", ("mul", U, _ONE_MINUS_U), ("sub", U, c["a"]))
    return ("mul", ("pow2", U), ("pow2", _ONE_MINUS_U))


def diffusion_reaction(kind: str, c: Values, t_final: float) -> Expression:
    """u_t = nu u_xx + rho R(u)."""
    return ("sub", ("sub", first(t_final), ("mul", c["nu"], UXX)), ("mul", c["rho"], reaction(kind, c)))


# The derivative of each flux: u^2 / 2, u^3 / 3, sin u, cos u.
FLUX_SLOPES: Mapping[str, Expression] = {
    "burgers": U,
    "cubic": ("pow2", U),
    "sine": ("cos", U),
    "cosine": ("neg", ("sin", U)),
}


def conservation(kind: str, c: Values, t_final: float) -> Expression:
    """u_t = -k f(u)_x + (eps / pi) u_xx; without the last term where eps is zero."""
    moved = ("add", first(t_final), ("mul", c["k"], ("mul", FLUX_SLOPES[kind], UX)))
    return moved if c.get("viscosity", 0.0) == 0 else ("sub", moved, ("mul", c["viscosity"], UXX))


def fokker_planck(c: Values, t_final: float) -> Expression:
    """u_t = D u_xx - s sin(x / L) u_x - (s / L) cos(x / L) u."""
    angle = ("mul", 1 / c["length"], "x")
    drift = ("mul", ("mul", c["drift"], ("sin", angle)), UX)
    growth = ("mul", ("mul", c["drift"] / c["length"], ("cos", angle)), U)
    return ("add", ("sub", first(t_final), ("mul", c["diffusion"], UXX)), drift, growth)
