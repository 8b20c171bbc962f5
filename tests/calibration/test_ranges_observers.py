"""Ranges of known distributions are where theory has them; a histogram is one, however it came."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import entropy

from msn_export.calibration.qdq import FP8, INT8, Format
from msn_export.calibration.ranges import BINS, Histogram, Observer, require_meaning, threshold
from msn_export.errors import SpecError

COUNT = 1_000_000


def normal(scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(0).standard_normal(COUNT) * scale).astype(np.float32)


def laplace() -> np.ndarray:
    return np.random.default_rng(0).laplace(size=COUNT).astype(np.float32)


def with_outlier() -> np.ndarray:
    """A normal distribution, and one value in a hundred thousand a hundred times as large."""
    values = normal()
    values[::100_000] = 100.0
    return values


def seen(values: np.ndarray, parts: int = 1) -> Histogram:
    histogram = Histogram()
    for part in np.array_split(values, parts):
        histogram.add(part)
    return histogram


def error(values: np.ndarray, limit: float, form: Format) -> float:
    """Compute the mean squared error of quantising with a range, on the values themselves."""
    return float(np.square(form.carry(values, limit / form.largest) - values).mean())


@pytest.mark.parametrize("form", [INT8, FP8])
def test_max_is_the_largest_magnitude_to_the_last_bit(form) -> None:
    values = np.array([0.1, -7.3, 2.0], np.float32)
    assert threshold(seen(values), Observer.MAX, form) == float(np.float32(7.3))


def test_percentile_is_the_quantile_of_the_distribution() -> None:
    # 99.99 % of |N(0, 1)| is below 3.8906 and of |Laplace(1)| below ln(10,000) = 9.2103; a million
    # values have a hundred above it, a tenth of which is the error of counting
    assert threshold(seen(normal()), Observer.PERCENTILE, INT8) == pytest.approx(3.8906, rel=0.02)
    assert threshold(seen(laplace()), Observer.PERCENTILE, INT8) == pytest.approx(9.2103, rel=0.02)


def test_mse_is_the_optimal_clipping_value() -> None:
    # Banner et al., arXiv 1810.05723, table of optimal clipping at 8 bits: 3.92 sigma, 9.89 b.
    # Their steps are twice the limit through 256, ours through 254, and the minimum is flat.
    assert threshold(seen(normal()), Observer.MSE, INT8) == pytest.approx(3.92, rel=0.05)
    assert threshold(seen(laplace()), Observer.MSE, INT8) == pytest.approx(9.89, rel=0.05)


@pytest.mark.parametrize("form", [INT8, FP8], ids=["int8", "fp8"])
@pytest.mark.parametrize("draw", [normal, laplace, with_outlier])
def test_mse_is_no_worse_than_any_other_range(draw, form) -> None:
    values = draw()
    histogram = seen(values)
    chosen = error(values, threshold(histogram, Observer.MSE, form), form)
    tried = [error(values, histogram.peak * share, form) for share in np.geomspace(1 / 64, 1, 40)]
    # bins and candidates are both coarser than the values: 2 % is what that costs at most here
    assert chosen <= min(tried) * 1.02


def test_an_outlier_widens_max_and_leaves_mse_and_percentile_near_the_bulk() -> None:
    histogram = seen(with_outlier())
    chosen = {observer: threshold(histogram, observer, INT8) for observer in Observer}
    assert chosen[Observer.MAX] == 100.0
    assert chosen[Observer.PERCENTILE] == pytest.approx(3.9, rel=0.03)
    # ten values that lose 60 each cost as much as 127 steps twice as wide for all others
    assert chosen[Observer.MSE] < 100.0
    assert 2.5 < chosen[Observer.ENTROPY] < 10.0


def divergence(counts: list[float], end: int) -> float:
    """Follow S. Migacz, GTC 2017, slides 36 to 38, bin by bin: KL of ``end`` bins in 128 levels."""
    reference = counts[:end]
    reference[-1] += sum(counts[end:])
    candidate = [0.0] * end
    wide = end // 128
    for level in range(128):
        last = end if level == 127 else (level + 1) * wide
        held = [i for i in range(level * wide, last) if counts[i] > 0]
        for i in held:
            candidate[i] = sum(counts[level * wide : last]) / len(held)
    # "candidate distributions may have zeros": the slides leave open what they count; here, once
    candidate = [1.0 if p and not q else q for p, q in zip(reference, candidate, strict=True)]
    return float(entropy(reference, candidate))


def test_entropy_is_the_least_divergence_of_the_search_it_is_named_after() -> None:
    values = normal()[:20_000]
    values[:20] *= 4
    histogram = seen(values)
    counts = histogram.counts.astype(float).tolist()
    last = int(np.flatnonzero(histogram.counts)[-1]) + 1
    ends = [*range(128, last, 8), last]
    best = ends[int(np.argmin([divergence(counts, end) for end in ends]))]
    assert 128 < best < last
    chosen = threshold(histogram, Observer.ENTROPY, INT8)
    assert chosen == min(best * histogram.width, histogram.peak)


def test_entropy_keeps_what_needs_no_clipping() -> None:
    values = np.linspace(-1, 1, 10_001, dtype=np.float32)
    assert threshold(seen(values), Observer.ENTROPY, INT8) == pytest.approx(1.0, rel=0.01)


@pytest.mark.parametrize("observer", list(Observer))
@pytest.mark.parametrize("power", [-80, 80])
def test_a_range_scales_with_its_values(observer, power) -> None:
    values = normal()[:100_000]
    unit = threshold(seen(values), observer, INT8)
    assert threshold(seen(np.ldexp(values, power)), observer, INT8) == unit * 2.0**power


@pytest.mark.parametrize("observer", list(Observer))
def test_a_tensor_that_is_zero_has_range_zero(observer) -> None:
    assert threshold(seen(np.zeros((2, 3), np.float32)), observer, INT8) == 0.0
    assert threshold(Histogram(), observer, INT8) == 0.0


@pytest.mark.parametrize("observer", list(Observer))
def test_a_single_value_is_inside_its_own_range(observer) -> None:
    chosen = threshold(seen(np.full(1000, -3.0, np.float32)), observer, INT8)
    assert chosen == pytest.approx(3.0, rel=1e-3)


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=60),
    st.randoms(use_true_random=False),
)
def test_counts_depend_neither_on_order_nor_on_batches(values, random) -> None:
    whole = seen(np.asarray(values, np.float32))
    random.shuffle(values)
    dealt = seen(np.asarray(values, np.float32), parts=random.randint(1, len(values)))
    assert (dealt.peak, dealt.limit) == (whole.peak, whole.limit)
    np.testing.assert_array_equal(dealt.counts, whole.counts)
    assert whole.counts.sum() == len(values)
    assert whole.peak < whole.limit <= max(2 * whole.peak, 2.0**-100)


def test_each_value_is_counted_in_its_own_bin() -> None:
    values = normal()[:10_000]
    histogram = seen(values, parts=7)
    wanted, _ = np.histogram(np.abs(values), BINS, (0.0, histogram.limit))
    np.testing.assert_array_equal(histogram.counts, wanted)


def test_entropy_has_no_meaning_for_fp8() -> None:
    require_meaning(Observer.ENTROPY, INT8)
    require_meaning(Observer.MSE, FP8)
    with pytest.raises(SpecError, match=r"entropy compares with int8's even steps, which fp8 does"):
        require_meaning(Observer.ENTROPY, FP8)
