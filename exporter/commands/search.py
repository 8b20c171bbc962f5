"""The steps of ``msn-export search``: pictures, the model of an index, their nearest neighbours."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from msn_export import __version__
from msn_export.commands.jobs import SearchJob
from msn_export.embedding.decode import read
from msn_export.embedding.index import (
    EXACT,
    IndexRecord,
    nearest,
    open_index,
    read_record,
    require_usearch,
    table_of,
)
from msn_export.embedding.inference import read_rows, reading_of, stack
from msn_export.errors import ImageError, MissingPackageError, OutputError, SpecError
from msn_export.feed import Feed
from msn_export.files import move, placing, require_writable, staging
from msn_export.manifest import manifest_path, sha256_of
from msn_export.preprocessing import Preprocessing
from msn_export.progress import SILENT
from msn_export.runtime import open_runner
from msn_export.schema import Result
from msn_export.spec import InputFormat

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from msn_export.progress import Progress

__all__ = ["SearchJob", "run_search"]


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A picture of the table: its row, its path below the folder, and its label if it has one."""

    row: int
    picture: str
    cosine: float
    label: str | None


@dataclass(frozen=True, slots=True)
class Query:
    """A picture that was asked for, with its neighbours, or why it has none."""

    picture: str
    error: str | None
    neighbours: tuple[Neighbour, ...]


@dataclass(frozen=True, slots=True, repr=False)
class Searched(Result):
    """The nearest pictures of each query, by cosine; ``exact`` says whether all were compared."""

    index: str
    table: str
    folder: str
    images: int
    model: str
    output_name: str
    exact: bool
    queries: tuple[Query, ...]
    output: str | None
    preprocessing: Preprocessing
    runner: str
    notes: tuple[str, ...]
    seconds: float


def run_search(job: SearchJob, progress: Progress = SILENT) -> Searched:
    """Find the pictures of an index that are nearest to those of the job.

    Raises:
        MsnExportError: nothing could be searched; the message says why.
    """
    started = time.monotonic()
    require_usearch()
    _require_page(job)
    record = read_record(job.index)
    with progress.step("verify the index"):
        model = _model(job, record)
        index = open_index(job.index, record)
    with progress.step("open the model"):
        runner = open_runner(
            model,
            device=job.device,
            providers=job.providers or None,
            trust=job.trust,
            eager_kernels=True,  # a vector does not depend on which kernels were ready
        )
    with runner, progress.step("embed the pictures"):
        vectors, errors = _embed(job, record, runner)
        name = runner.name
    with progress.step("search"):
        searched = np.array([row for row in range(len(vectors)) if row not in errors], np.intp)
        keys, cosines = nearest(index, vectors[searched], job.k)
        rows = _rows_of(table_of(job.index), keys)
    found = {
        int(query): tuple(
            Neighbour(int(key), rows[int(key)][0], float(cosine), rows[int(key)][1])
            for key, cosine in zip(keys[at], cosines[at], strict=True)
        )
        for at, query in enumerate(searched)
    }
    exact = record.indexed <= EXACT
    notes = [] if exact else [f"above {EXACT:,} vectors the search is approximate"]
    left_out = record.rows - record.indexed
    if left_out:
        notes.append(f"{left_out} of {record.rows} rows have no vector and are not searched")
    result = Searched(
        index=str(job.index),
        table=str(table_of(job.index)),
        folder=record.folder,
        images=record.indexed,
        model=str(model),
        output_name=record.output_name,
        exact=exact,
        queries=tuple(
            Query(str(path), errors.get(at), found.get(at, ()))
            for at, path in enumerate(job.queries)
        ),
        output=str(job.output) if job.output is not None else None,
        preprocessing=record.preprocessing,
        runner=name,
        notes=tuple(notes),
        seconds=round(time.monotonic() - started, 3),
    )
    if job.output is not None:
        _write_page(job, job.output, result, progress)
    return result


def _model(job: SearchJob, record: IndexRecord) -> Path:
    """Find the model that the index was made with, and no other."""
    model = job.model or Path(record.model)
    if not model.is_file():
        raise SpecError(
            f"{job.index} was made with {model}, which is not there; name that file with --model"
        )
    found = sha256_of(model)
    if found != record.model_sha256:
        raise SpecError(
            f"{model} is not the model of {job.index}: its sha256 is {found[:16]}…, expected "
            f"{record.model_sha256[:16]}…; vectors of two models cannot be compared, so name that "
            "one with --model, or embed again"
        )
    return model


def _embed(
    job: SearchJob, record: IndexRecord, runner: Any
) -> tuple[NDArray[np.float32], dict[int, str]]:
    """Run the pictures as those of the index were; give vectors [m, d], and what has none."""
    reading = reading_of(str(job.index), runner.outputs, record.output_name)
    taken = Feed(InputFormat(runner.inputs[0].dtype), record.preprocessing)
    preprocessing, batch = record.preprocessing, runner.batch.opt
    vectors = np.zeros((len(job.queries), record.dim), np.float32)
    errors: dict[int, str] = {}
    for start in range(0, len(job.queries), batch):
        decoded = [read(path, preprocessing) for path in job.queries[start : start + batch]]
        pictures = stack(decoded, preprocessing.size, preprocessing.channels)
        rows = read_rows(runner(taken(pictures.pixels)), reading, pictures)
        if rows.vectors.shape[1:] != (record.dim,):
            raise OutputError(
                f"{job.index} has vectors of {record.dim} numbers, and {reading.vector} gives "
                f"{list(rows.vectors.shape[1:])}; embed again"
            )
        vectors[start : start + len(decoded)] = rows.vectors
        errors |= {start + at: text for at, text in rows.errors.items()}
    for at in np.flatnonzero(np.linalg.norm(vectors, axis=1) == 0).tolist():
        errors.setdefault(at, "its vector is zero: it has no direction")
    if len(errors) == len(vectors):
        raise ImageError(
            f"none of the {len(vectors)} pictures can be searched for; the first: {errors[0]}"
        )
    return vectors, errors


def _rows_of(table: Path, keys: NDArray[np.uint64]) -> dict[int, tuple[str, str | None]]:
    """Read the path and the label of some rows of the table."""
    import pyarrow as pa
    from pyarrow import parquet

    wanted = np.unique(keys)
    try:
        with parquet.ParquetFile(table) as file:
            names = [name for name in ("path", "label") if name in file.schema_arrow.names]
            rows = file.read(names).take(wanted.astype(np.int64))
    except (OSError, pa.ArrowException) as error:
        reason = str(error).partition("\n")[0]
        raise OutputError(f"{table} cannot be read ({reason}); embed again") from error
    paths = rows.column("path").to_pylist()
    labels = rows.column("label").to_pylist() if "label" in names else [None] * len(paths)
    return dict(zip(wanted.tolist(), zip(paths, labels, strict=True), strict=True))


def _require_page(job: SearchJob) -> None:
    """Refuse, before anything ran, a page that could not be written."""
    if job.output is None:
        return
    if job.output.suffix != ".html":
        raise SpecError(f"output {job.output} is a page; name it .html")
    read_here = [job.index, manifest_path(job.index), table_of(job.index), *job.queries]
    require_writable([job.output], force=job.force, sources=read_here)
    try:
        import msn_export.reporting.search  # noqa: F401
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        raise MissingPackageError(
            f"a page needs the package {package}; pip install 'msn-export[report]'"
        ) from error


def _write_page(job: SearchJob, output: Path, result: Searched, progress: Progress) -> None:
    from msn_export.reporting.gather import now, picture_thumbnail
    from msn_export.reporting.search import SearchPage, ShownPicture, ShownQuery, write_page

    def shown(path: Path, *lines: str) -> ShownPicture:
        return ShownPicture(picture_thumbnail(path, result.preprocessing), lines)

    folder = Path(result.folder)
    page = SearchPage(
        index=result.index,
        images=result.images,
        queries=tuple(
            ShownQuery(
                shown(Path(query.picture), query.picture, *([query.error] if query.error else [])),
                tuple(
                    shown(
                        _below(folder, one.picture),
                        f"{one.cosine:.4f}",
                        *([one.label] if one.label else []),
                        one.picture,
                    )
                    for one in query.neighbours
                ),
            )
            for query in result.queries
        ),
        facts=(
            ("folder", result.folder),
            ("model", result.model),
            ("output", result.output_name),
            ("search", "exact" if result.exact else "approximate"),
            ("runner", result.runner),
            ("preprocessing", str(result.preprocessing)),
        ),
        notes=result.notes,
        command=job.command,
        written=now(),
        product=f"msn-export {__version__}",
    )
    with progress.step(f"write {output}"), staging(output.parent) as stage:
        write_page(page, stage / "page.html")
        with placing([output], force=job.force):
            move((stage / "page.html"), output)


def _below(folder: Path, name: str) -> Path:
    """Name a picture of the table; one that lies elsewhere than below the folder is not shown."""
    base = folder if folder.is_dir() else folder.parent
    path = base / name
    outside = ".." in Path(name).parts or not path.is_relative_to(base)
    return folder if outside else path
