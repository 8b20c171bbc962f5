"""The plot of growth is drawn from its results, with the exponent of the last step."""

import math
from pathlib import Path

import pytest

growth = pytest.importorskip("growth", reason="there are no benchmarks here")


def row(command: str, model: str, images: int, **figures: float) -> dict[str, object]:
    work = {"small": 4e9, "base": 16e9}[model]
    return {"command": command, "model": model, "images": images, "multiply_adds": work, **figures}


def results() -> dict[str, object]:
    runs = [
        row(command, "small", count, wall_s=2.0 * count, cpu_s=3.0 * count, peak_gb=1.0)
        for command, counts in growth.COUNTS.items()
        for count in {growth.FEW[command], *counts}
    ]
    # a second round, and a model whose time grows with the square of its work
    first = row("embed", "small", growth.FEW["embed"], wall_s=36.0, cpu_s=1.0, peak_gb=1.0)
    base = row("embed", "base", growth.FEW["embed"], wall_s=16 * 34.0, cpu_s=1.0, peak_gb=2.0)
    return {"runs": [*runs, first, base]}


def test_the_exponent_is_that_of_the_last_step_over_medians() -> None:
    found = results()
    by_images = growth.medians(found, "embed", "images", "wall_s")
    assert list(by_images) == list(growth.COUNTS["embed"]), (
        "runs of other models are not among them"
    )
    assert growth.exponent(by_images) == pytest.approx(1.0)
    by_work = growth.medians(found, "embed", "multiply_adds", "wall_s")
    assert by_work == {4e9: 34.0, 16e9: 16 * 34.0}
    assert growth.exponent(by_work) == pytest.approx(2.0)
    assert math.isnan(growth.exponent({4e9: 1.0}))


def test_every_command_grows_with_images_and_with_the_model() -> None:
    runs = growth.every()
    assert len(runs) == len(set(runs))
    for command in growth.COUNTS:
        of = [run for run in runs if run.command == command]
        assert {run.model for run in of if run.images == growth.FEW[command]} == set(growth.MODELS)
        assert {run.images for run in of if run.model == "small"} >= set(growth.COUNTS[command])
        assert {run.images for run in of if run.model == "large-7"} == {growth.FEW[command]}


@pytest.mark.parametrize("theme", growth.THEMES)
def test_the_plot_names_each_commands_exponent(theme) -> None:
    drawn = growth.draw(results(), theme)
    legends = [axes.get_legend() for axes in drawn.axes]
    texts = [[text.get_text() for text in legend.get_texts()] for legend in legends]
    assert [len(of) for of in texts] == [len(growth.COUNTS)] * 4
    assert texts[0][2] == "embed: exponent 1.00"
    assert texts[1][2] == "embed: exponent 2.00"


def test_a_new_run_takes_the_place_of_an_older_one_alone(tmp_path) -> None:
    path = Path(tmp_path / "growth.json")
    old = [row("onnx", "small", 16, wall_s=1.0), row("onnx", "base", 16, wall_s=2.0)]
    growth._write(old, path)
    growth._write([row("onnx", "small", 16, wall_s=3.0)] * 2, path)
    written = growth.json.loads(path.read_text())
    times = [(run["model"], run["wall_s"]) for run in written["runs"]]
    assert sorted(times) == [("base", 2.0), ("small", 3.0), ("small", 3.0)]
    assert written["machine"]["instructions"] is not None
