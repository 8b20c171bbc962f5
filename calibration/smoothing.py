"""Choose how strongly a graph is smoothed, by what 8 bits cost each product on a few images.

Each product is quantised by itself, on some rows of its input and some columns of its weight, as in
AWQ's search (arXiv 2306.00978, section 3.2): no graph is run for a strength. On 16 images the
embedding's own error differs by a tenth from one draw of them to the next, the products' by 3 %
(docs/quantization.md).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from msn_export.calibration.plan import Plan
from msn_export.calibration.qdq import Role, scales
from msn_export.calibration.ranges import Histogram, Seen, SmoothingRecord, threshold
from msn_export.calibration.smoothquant import (
    SmoothingSite,
    factors,
    find_smoothing_sites,
    fold,
    largest_weights,
)
from msn_export.errors import GraphError
from msn_export.graph.builder import array_of
from msn_export.spec import Observer

# Strengths that --smooth auto tries beside none; SmoothQuant's own default is 0.5 (arXiv
# 2211.10438, section 5.1).
STRENGTHS = (0.25, 0.5, 0.75)
# How much less error than without it a strength must leave to be taken. Where there are no outliers
# one leaves 0.97 to 1.05 of the error; where int8 needs it 0.05 to 0.1 (docs/quantization.md,
# planted outliers).
GAIN = 0.1
# Rows of each image, and columns of each weight, that a product's error is measured on.
ROWS = 16
COLUMNS = 128


@dataclass(frozen=True, slots=True)
class ActivationSample:
    """Activations of a few images: the values ``names``, whose last axis is channels.

    ``maxima`` have the largest absolute value of each channel [c], over all rows; ``rows`` are some
    of them, [r, c].
    """

    names: tuple[str, ...]
    maxima: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    rows: dict[str, list[NDArray[np.float32]]] = field(default_factory=dict)

    @classmethod
    def of(cls, plan: Plan) -> "ActivationSample":
        """Start a sample of all that is needed to choose a plan's smoothing."""
        sites = (site.name for site in find_smoothing_sites(plan.model, plan.projections))
        read = (product.x for product in plan.projections if product.role is not Role.PATCH)
        return cls(tuple(dict.fromkeys([*sites, *read])))

    def add(self, seen: Seen) -> None:
        """Add a batch, [b, .., c] each."""
        for name in self.names:
            values = seen[name].reshape(len(seen[name]), -1, seen[name].shape[-1])  # [b, n, c]
            peaks = np.abs(values).max(axis=(0, 1))
            self.maxima[name] = np.maximum(self.maxima.get(name, peaks), peaks)
            count = values.shape[1]
            chosen = np.linspace(0, count - 1, min(ROWS, count)).astype(int)
            rows = values[:, chosen].reshape(-1, values.shape[-1])
            self.rows.setdefault(name, []).append(rows)


def smooth(
    plan: Plan, strength: float | None, activations: ActivationSample, observer: Observer
) -> tuple[Plan, SmoothingRecord]:
    """Smooth a plan's graph; ``strength`` None takes the best of ``STRENGTHS``, or none.

    None where the best leaves no ``GAIN`` less error: what is no better needs no changed weights.
    """
    sites = find_smoothing_sites(plan.model, plan.projections)
    weights = {site.name: largest_weights(plan.model, site) for site in sites}
    tried = {
        f"{choice:g}": {
            site.name: factors(activations.maxima[site.name], weights[site.name], choice)
            for site in sites
        }
        for choice in (STRENGTHS if strength is None else (strength,))
    }
    errors, chosen = None, next(iter(tried))
    if strength is None:
        errors = _errors(plan, sites, activations, observer, {"off": {}, **tried})
        chosen = min(tried, key=lambda name: errors[name])
        if not errors[chosen] < (1 - GAIN) * errors["off"]:
            return plan, SmoothingRecord(errors=errors)
    exponents = {
        name: tuple(int(power) for power in np.log2(scale)) for name, scale in tried[chosen].items()
    }
    record = SmoothingRecord(float(chosen), exponents, errors)
    return replay(plan, record), record


def replay(plan: Plan, record: SmoothingRecord) -> Plan:
    if not record.exponents:
        return plan
    model = plan.model.clone()
    sites = {site.name: site for site in find_smoothing_sites(model, plan.projections)}
    for name, exponents in record.exponents.items():
        if name not in sites:
            raise GraphError(f"{name!r} cannot be smoothed here; leave --ranges out")
        fold(model, sites[name], np.exp2(np.asarray(exponents, np.float32)))
    return replace(plan, model=model)


def _errors(
    plan: Plan,
    sites: Sequence[SmoothingSite],
    activations: ActivationSample,
    observer: Observer,
    tried: Mapping[str, Mapping[str, NDArray[np.float32]]],
) -> dict[str, float]:
    """Give for each choice of factors the products' relative error, root mean square over all."""
    squares: dict[str, list[float]] = {name: [] for name in tried}
    for product in _products(plan, sites, activations):
        unscaled = product.error(plan, observer, np.float32(1.0))
        for name, scales_of in tried.items():
            scale = scales_of.get(product.site)
            found = unscaled if scale is None else product.error(plan, observer, scale)
            squares[name].append(found)
    return {name: float(np.sqrt(np.mean(found))) for name, found in squares.items()}


@dataclass(frozen=True, slots=True)
class _Product:
    """Some rows of a product's input, some columns of its weight, and their exact result.

    ``site`` is the value whose channels smoothing divides, "" where nothing can.
    """

    site: str
    x: NDArray[np.float32]  # [r, c]
    maxima: NDArray[np.float32]  # [c]
    weight: NDArray[np.float32]  # [c, k]
    exact: NDArray[np.float32]  # [r, k]

    def error(
        self, plan: Plan, observer: Observer, scale: NDArray[np.float32] | np.float32
    ) -> float:
        """Give the mean squared error of the result in 8 bits, as a share of its mean square.

        Channels of the input are divided by ``scale`` [c] first, rows of the weight multiplied.
        """
        scheme = plan.scheme
        x, weight = self.x / scale, self.weight * np.reshape(scale, (-1, 1))
        histogram = Histogram()
        histogram.add(x)
        histogram.add(np.max(self.maxima / scale, keepdims=True))  # the rows may not have the peak
        limit = threshold(histogram, observer, scheme.form)
        steps = scales(np.abs(weight).max(axis=0), scheme.weights, scheme.scale)
        carried = scheme.form.carry(x, scales(limit, scheme.form, scheme.scale))
        got = carried @ scheme.weights.carry(weight, steps)
        power = np.square(self.exact, dtype=np.float64).sum()
        wrong = np.square(got - self.exact, dtype=np.float64).sum()
        return float(wrong / power) if power else 0.0


def _products(
    plan: Plan, sites: Sequence[SmoothingSite], activations: ActivationSample
) -> Iterator[_Product]:
    site_of = {node: site.name for site in sites for node, _ in site.read}
    for product in plan.projections:
        if product.role is Role.PATCH:
            continue
        held = array_of(plan.model.graph.initializers[product.weight])
        weight = np.moveaxis(held, product.axis, -1)
        columns = np.linspace(0, weight.shape[1] - 1, min(COLUMNS, weight.shape[1])).astype(int)
        weight = weight[:, columns]
        x = np.concatenate(activations.rows[product.x])
        site = site_of.get(product.node, "")
        yield _Product(site, x, activations.maxima[product.x], weight, x @ weight)
