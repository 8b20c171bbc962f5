"""How a graph was quantised, and the verdict, in lines that a person reads."""

from collections.abc import Iterator

from msn_export.manifest_records import QuantizationRecord


def quantization_rows(record: QuantizationRecord) -> Iterator[tuple[str, str]]:
    """Describe a quantisation in lines of a name and a text."""
    yield "quantised", f"{record.products} of {record.expected} products to {record.format}"
    what = ", ".join(
        name
        for name, used in (
            (f"ranges by {record.observer}", True),
            (
                "smoothing off" if record.smoothing is None else f"smoothing {record.smoothing:g}",
                True,
            ),
            ("attention too", record.attention),
            ("biases corrected", record.bias_correction),
        )
        if used
    )
    yield "", f"{what}; the rest in {record.base}"
    if record.smoothing_errors:
        errors = ", ".join(f"{name} {error:.2%}" for name, error in record.smoothing_errors.items())
        yield "", f"error by smoothing: {errors}"
    for name, reason in record.kept.items():
        yield "kept", f"{name} in {reason}"
    yield (
        "images",
        (
            f"{record.calibration_images} calibrated on, {len(record.held_out)} held out "
            f"(seed {record.seed}); {record.ranges.file}"
        ),
    )
    yield "sizes", ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in record.sizes.items())
    for title, shares in (("neighbours", record.neighbours), ("classes", record.classes)):
        known = {name: share for name, share in shares.items() if share is not None}
        if known:
            yield f"same {title}", ", ".join(f"{share:.1%} {name}" for name, share in known.items())
    yield from _compiled(record)


def _compiled(record: QuantizationRecord) -> Iterator[tuple[str, str]]:
    told = record.compiled
    if "reason" in told:
        yield "compiled", f"no: {told['reason']}"
        if "reason" not in record.latency:
            yield "timed", _timed(record)
        return
    yield "compiled", f"by {told['compiler']}, counted, not executed"
    for name in (record.base, record.format):
        one = told[name]
        eight = f", {one['multiplied']} of {one['products']} in {name}" if one["products"] else ""
        gemms = ", ".join(f"{count} {dtype}" for dtype, count in one["gemm_dtypes"].items())
        yield (
            "",
            (
                f"{name}: {one['kernels']} kernels, {one['fused_attention']} fused attention, "
                f"products {gemms}{eight}, {one['bytes'] / 1e6:.1f} MB"
            ),
        )
    yield "timed", _timed(record)


def _timed(record: QuantizationRecord) -> str:
    told = record.latency
    if "reason" in told:
        return f"no: {told['reason']}"
    times = ", ".join(f"{told[name]:.2f} ms {name}" for name in (record.base, record.format))
    copies = "" if "reason" in record.compiled else ", copies included"  # to a GPU and back
    return f"batch {told['batch']}{copies}: {times}; on {told['device']}"
