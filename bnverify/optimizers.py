"""Optimizers as their papers define them, in float64 NumPy, to compare Optax's optimizers with.

A formula yields the updates of one param for a sequence of gradients; the param moves by each of them.
Hyperparameters have Optax's names. Where a paper leaves a detail open, such as the place of epsilon, the
formula follows Optax's documentation, and says so.

Every number computed from hyperparameters goes through ``Hyper.c``: a library may hold it in float32, so
its updates may differ by as much as one rounding of each of these numbers makes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[np.float64]


class Hyper:
    """The hyperparameters of one optimizer.

    Args:
        values: name, as in Optax, -> value; the learning rate is "learning_rate".
        rng: chooses the direction of each rounding; None: nothing is rounded.
    """

    def __init__(self, values: Mapping[str, Any], rng: np.random.Generator | None = None) -> None:
        self._values, self._rng = values, rng

    def __getattr__(self, name: str) -> Any:
        return self._values.get(name, 0.0)

    def c(self, value: float) -> float:
        """Return ``value``; with an ``rng``, one float32 rounding up or down."""
        if self._rng is None:
            return value
        return value * (1 + 2.0**-24 * float(self._rng.choice([-1.0, 1.0])))


Formula: TypeAlias = Callable[[Hyper, Array, Sequence[Array]], Iterator[Array]]


@dataclass(frozen=True)
class Paper:
    """An optimizer with the paper that defines it.

    Attributes:
        source: authors, year, and where in the paper.
        formula: (hyperparameters, param, gradients) -> its updates.
        numbers: the hyperparameters of the formula that are numbers.
        flags: the hyperparameters of the formula that are True, False or None.
        first: the number of the first update that the paper defines.
    """

    source: str
    formula: Formula
    numbers: tuple[str, ...]
    flags: tuple[str, ...] = field(default=())
    first: int = 1


def sgd(h: Hyper, param: Array, grads: Sequence[Array]) -> Iterator[Array]:
    """With t = g + momentum t, the update is -lr t, Nesterov's -lr (g + momentum t)."""
    yield from (-h.learning_rate * each for each in _traced(h, grads))


def _traced(h: Hyper, grads: Sequence[Array]) -> Iterator[Array]:
    decay, trace = h.momentum or 0.0, np.zeros_like(grads[0])
    for g in grads:
        trace = g + h.c(decay) * trace
        yield g + h.c(decay) * trace if h.nesterov else trace


def _first_moment(h: Hyper, m: Array, g: Array, t: int) -> Array:
    """Return the bias-corrected m; with Nesterov's momentum, that of the next step."""
    if not h.nesterov:
        return m / (1 - h.c(h.b1) ** t)
    ahead = h.c(h.b1) * m / (1 - h.c(h.b1) ** (t + 1))
    return ahead + h.c(1 - h.b1) * g / (1 - h.c(h.b1) ** t)


def _adam_directions(h: Hyper, grads: Sequence[Array]) -> Iterator[Array]:
    m = v = np.zeros_like(grads[0])
    for t, g in enumerate(grads, 1):
        m = h.c(h.b1) * m + h.c(1 - h.b1) * g
        v = h.c(h.b2) * v + h.c(1 - h.b2) * g**2
        root = np.sqrt(v / (1 - h.c(h.b2) ** t) + h.c(h.eps_root))
        yield _first_moment(h, m, g, t) / (root + h.c(h.eps))


def adam(h: Hyper, param: Array, grads: Sequence[Array]) -> Iterator[Array]:
    """-lr (m^ / (sqrt(v^) + eps) + weight_decay p), with bias-corrected moments m^ and v^."""
    for direction in _adam_directions(h, grads):
        update = -h.learning_rate * (direction + h.c(h.weight_decay) * param)
        param = param + update
        yield update


def lamb(h: Hyper, param: Array, grads: Sequence[Array]) -> Iterator[Array]:
    """-lr times Adam's direction with decay, scaled to the norm of the param."""
    for direction in _adam_directions(h, grads):
        whole = direction + h.c(h.weight_decay) * param
        length, own = np.linalg.norm(param), np.linalg.norm(whole)
        update = -h.learning_rate * whole * (length / own if length * own else 1.0)
        param = param + update
        yield update


def adamax(h: Hyper, param: Array, grads: Sequence[Array]) -> Iterator[Array]:
    """-lr m^ / u with u = max(b2 u, |g|); Optax adds eps to |g| to avoid a division by 0."""
    m = u = np.zeros_like(grads[0])
    for t, g in enumerate(grads, 1):
        m = h.c(h.b1) * m + h.c(1 - h.b1) * g
        u = np.maximum(h.c(h.b2) * u, np.abs(g) + h.c(h.eps))
        yield -h.learning_rate * m / (1 - h.c(h.b1) ** t) / u


def rmsprop(h: Hyper, param: Array, grads: Sequence[Array]) -> Iterator[Array]:
    """-lr g / sqrt(v + eps), with v the average of g^2; if centred, of (g - m)^2.

    Hinton's lecture has no eps; Optax adds it inside the root, or outside with ``eps_in_sqrt=False``,
    and applies the momentum to the scaled gradients.
    """

    def scaled() -> Iterator[Array]:
        m, v = np.zeros_like(grads[0]), np.full_like(grads[0], h.c(h.initial_scale))
        for t, g in enumerate(grads, 1):
            m = h.c(h.decay) * m + h.c(1 - h.decay) * g
            v = h.c(h.decay) * v + h.c(1 - h.decay) * g**2
            bias = 1 - h.c(h.decay) ** t if h.bias_correction else 1.0
            var = v / bias - (m / bias) ** 2 if h.centered else v / bias
            inside, outside = (h.c(h.eps), 0.0) if h.eps_in_sqrt else (0.0, h.c(h.eps))
            yield -h.learning_rate * g / (np.sqrt(var + inside) + outside)

    yield from _traced(h, list(scaled()))


def adagrad(h: Hyper, param: Array, grads: Sequence[Array]) -> Iterator[Array]:
    """-lr g / sqrt(s + eps), with s = ``initial_accumulator_value`` + the sum of all g^2."""
    s = np.full_like(grads[0], h.c(h.initial_accumulator_value))
    for g in grads:
        s = s + g**2
        yield np.where(s > 0, -h.learning_rate * g / np.sqrt(s + h.c(h.eps)), 0.0)


def adadelta(h: Hyper, param: Array, grads: Sequence[Array]) -> Iterator[Array]:
    """-lr sqrt(E[u^2] + eps) / sqrt(E[g^2] + eps) g, with u the updates without the learning rate."""
    of_g = of_u = np.zeros_like(grads[0])
    for gradient in grads:
        g = gradient + h.c(h.weight_decay) * param
        of_g = h.c(h.rho) * of_g + h.c(1 - h.rho) * g**2
        u = np.sqrt(of_u + h.c(h.eps)) / np.sqrt(of_g + h.c(h.eps)) * g
        of_u = h.c(h.rho) * of_u + h.c(1 - h.rho) * u**2
        param = param - h.learning_rate * u
        yield -h.learning_rate * u


def lion(h: Hyper, param: Array, grads: Sequence[Array]) -> Iterator[Array]:
    """-lr (sign(b1 m + (1 - b1) g) + weight_decay p), then m = b2 m + (1 - b2) g."""
    m = np.zeros_like(grads[0])
    for g in grads:
        direction = np.sign(h.c(h.b1) * m + h.c(1 - h.b1) * g)
        update = -h.learning_rate * (direction + h.c(h.weight_decay) * param)
        m = h.c(h.b2) * m + h.c(1 - h.b2) * g
        param = param + update
        yield update


def adabelief(h: Hyper, param: Array, grads: Sequence[Array]) -> Iterator[Array]:
    """Adam with s, the average of (g - m)^2, instead of v; ``eps_root`` is added to s in each step."""
    m = s = np.zeros_like(grads[0])
    for t, g in enumerate(grads, 1):
        m = h.c(h.b1) * m + h.c(1 - h.b1) * g
        s = h.c(h.b2) * s + h.c(1 - h.b2) * (g - m) ** 2 + h.c(h.eps_root)
        root = np.sqrt(s / (1 - h.c(h.b2) ** t))
        yield -h.learning_rate * _first_moment(h, m, g, t) / (root + h.c(h.eps))


def radam(h: Hyper, param: Array, grads: Sequence[Array]) -> Iterator[Array]:
    """Adam times r once the variance is tractable; before that, -lr m^.

    Tractable means rho > 4 in the paper and rho >= 5 in its authors' code: see ``threshold``.
    """
    m = v = np.zeros_like(grads[0])
    longest = h.c(2 / (1 - h.b2) - 1)
    for t, g in enumerate(grads, 1):
        m = h.c(h.b1) * m + h.c(1 - h.b1) * g
        v = h.c(h.b2) * v + h.c(1 - h.b2) * g**2
        power = h.c(h.b2) ** t
        length = longest - 2 * t * power / (1 - power)
        direction = _first_moment(h, m, g, t)
        if length >= h.threshold:
            over = (length - 4) * (length - 2) * longest
            r = np.sqrt(over / ((longest - 4) * (longest - 2) * length))
            root = np.sqrt(v / (1 - h.c(h.b2) ** t) + h.c(h.eps_root))
            direction = r * direction / (root + h.c(h.eps))
        yield -h.learning_rate * direction


def optimistic_gradient_descent(h: Hyper, param: Array, grads: Sequence[Array]) -> Iterator[Array]:
    """-lr ((alpha + beta) g - beta g'), with g' the previous gradient, 0 in the first step."""
    for before, g in zip((grads[0], *grads), grads, strict=False):
        yield -h.learning_rate * (h.c(h.alpha + h.beta) * g - h.c(h.beta) * before)


def sm3(h: Hyper, param: Array, grads: Sequence[Array]) -> Iterator[Array]:
    """-lr times the average of g / sqrt(v), with v = g^2 + the smallest accumulator of an entry's covers.

    The covers are the slices along each axis; in a vector, each entry is its own cover. Optax adds 1e-8
    to v.
    """
    axes = range(grads[0].ndim)
    others = [tuple(o for o in axes if o != axis) for axis in axes]
    covers: list[Array] = [np.zeros((1,) * len(axes)) for _ in axes]
    average = np.zeros_like(grads[0])
    for g in grads:
        v = g**2 + reduce(np.minimum, covers)
        covers = [v.max(axis=other, keepdims=True) if other else v for other in others]
        scaled = np.where(v > 0, g / np.sqrt(v + h.c(1e-8)), 0.0)
        average = h.c(h.momentum) * average + h.c(1 - h.momentum) * scaled
        yield -h.learning_rate * average


def novograd(h: Hyper, param: Array, grads: Sequence[Array]) -> Iterator[Array]:
    """-lr m with m = b1 m + g / (sqrt(v) + eps) + weight_decay p and v an average of a layer's |g|^2."""
    m, v = np.zeros_like(param), 0.0
    for t, g in enumerate(grads, 1):
        square = float(np.sum(g**2))
        v = square if t == 1 else h.c(h.b2) * v + h.c(1 - h.b2) * square
        root = np.sqrt(v + h.c(h.eps_root)) + h.c(h.eps)
        m = h.c(h.b1) * m + g / root + h.c(h.weight_decay) * param
        update = -h.learning_rate * m
        param = param + update
        yield update


_ADAM = ("b1", "b2", "eps", "eps_root")

PAPERS: dict[str, Paper] = {
    "sgd": Paper(
        "Polyak 1964, heavy ball; Sutskever et al. 2013, equations 1 to 4, Nesterov's momentum",
        sgd,
        ("momentum",),
        ("nesterov",),
    ),
    "adam": Paper("Kingma & Ba 2015, arXiv:1412.6980, Algorithm 1", adam, _ADAM, ("nesterov",)),
    "nadam": Paper("Dozat 2016, Algorithm 2", adam, _ADAM, ("nesterov",)),
    "adamw": Paper(
        "Loshchilov & Hutter 2019, arXiv:1711.05101, Algorithm 2",
        adam,
        (*_ADAM, "weight_decay"),
        ("nesterov",),
    ),
    "lamb": Paper("You et al. 2020, arXiv:1904.00962, Algorithm 2", lamb, (*_ADAM, "weight_decay")),
    "adamax": Paper("Kingma & Ba 2015, arXiv:1412.6980, Algorithm 2", adamax, ("b1", "b2", "eps")),
    "rmsprop": Paper(
        "Tieleman & Hinton 2012, lecture 6.5; centred: Graves 2013, arXiv:1308.0850, equation 40",
        rmsprop,
        ("decay", "eps", "initial_scale", "momentum"),
        ("eps_in_sqrt", "centered", "nesterov", "bias_correction"),
    ),
    "adagrad": Paper(
        "Duchi, Hazan & Singer 2011, figure 1, diagonal",
        adagrad,
        ("initial_accumulator_value", "eps"),
    ),
    "adadelta": Paper(
        "Zeiler 2012, arXiv:1212.5701, Algorithm 1", adadelta, ("rho", "eps", "weight_decay")
    ),
    "lion": Paper(
        "Chen et al. 2023, arXiv:2302.06675, Algorithm 2", lion, ("b1", "b2", "weight_decay")
    ),
    "adabelief": Paper(
        "Zhuang et al. 2020, arXiv:2010.07468, Algorithm 2", adabelief, _ADAM, ("nesterov",)
    ),
    "radam": Paper(
        "Liu et al. 2020, arXiv:1908.03265, Algorithm 2",
        radam,
        (*_ADAM, "threshold"),
        ("nesterov",),
    ),
    "optimistic_gradient_descent": Paper(
        "Daskalakis et al. 2018, arXiv:1711.00141, equation 4",
        optimistic_gradient_descent,
        ("alpha", "beta"),
        first=2,
    ),
    "sm3": Paper("Anil et al. 2019, arXiv:1901.11150, Algorithm SM3-II", sm3, ("momentum",)),
    "novograd": Paper(
        "Ginsburg et al. 2019, arXiv:1905.11286, Algorithm 1",
        novograd,
        (*_ADAM, "weight_decay"),
    ),
}
"""Name of an Optax function -> the paper that defines its optimizer."""

SAMPLES = 8
"""The number of random roundings from which the tolerance is estimated."""


def expected(
    paper: Paper, values: Mapping[str, Any], param: Array, grads: Sequence[Array]
) -> tuple[Array, Array]:
    """Return the updates of a param by a paper's formula, and their tolerance.

    Args:
        paper: the optimizer.
        values: its hyperparameters, including "learning_rate".
        param: any shape.
        grads: the gradients, each of the shape of ``param``.

    Returns:
        Two arrays (len(grads), *param.shape), float64.
    """

    def updates(rng: np.random.Generator | None) -> Array:
        return np.stack(list(paper.formula(Hyper(values, rng), param, grads)))

    exact = updates(None)
    rounded = [np.abs(updates(np.random.default_rng(n)) - exact) for n in range(SAMPLES)]
    return exact, 4 * np.max(rounded, axis=0) + 1e-12 * np.abs(exact)
