"""Tables of pictures: .csv or .parquet with a column of paths, .txt with a path in each line."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING

from msn_export.errors import ImageError, MissingPackageError
from msn_export.input_files import TABLE, require_regular

if TYPE_CHECKING:
    from collections.abc import Sequence

TABLES = (".csv", ".parquet")
LISTS = (*TABLES, ".txt")
_UNPACKED = 2**32  # of a parquet's columns, which may be far more than the file
_ROWS = 10**8
_NAMED = 3  # faults of one kind that a message names
_LONGEST = 200  # characters of a name


def read_rows(source: Path, columns: tuple[str, ...] = ("path",)) -> list[tuple[Path, str]]:
    """Read the pictures of a table, each with what its second column says of it.

    Args:
        source: the file; paths in it are relative to its folder.
        columns: ``path``, and the second one if there is one.

    Raises:
        ImageError: it is no such table, names no picture, or files that do not exist.
    """
    read = {".csv": _read_csv, ".parquet": _read_parquet}.get(source.suffix.lower(), _read_list)
    require_regular(source, TABLE)
    try:
        read_columns = read(source, columns)
    except OSError as error:
        raise ImageError(f"{source} cannot be read: {error.strerror or error}") from error
    values = read_columns[1] if len(columns) > 1 else [""] * len(read_columns[0])
    rows = [
        (source.parent / path, value)
        for path, value in zip(read_columns[0], values, strict=True)
        if path
    ]
    lacking = [str(path) for path, _ in rows if not _is_file(path)]
    if lacking:
        raise ImageError(
            f"{source} names {listed(lacking, 'file')} that "
            f"{'does' if len(lacking) == 1 else 'do'} not exist; paths are relative to the table"
        )
    if not rows:
        raise ImageError(f"{source} has no rows; expected {_listed_columns(source, columns)}")
    return rows


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # too long a name, a folder that may not be entered
        return False


def _listed_columns(source: Path, columns: tuple[str, ...]) -> str:
    if source.suffix.lower() not in TABLES:
        return "a path in each line"
    return f"the column{'s' * (len(columns) > 1)} {' and '.join(columns)}"


def _read_list(source: Path, columns: tuple[str, ...]) -> list[list[str]]:  # noqa: ARG001
    try:
        return [source.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ImageError(f"{source} is no list in UTF-8: {error}") from error


def _read_csv(source: Path, columns: tuple[str, ...]) -> list[list[str]]:
    try:
        # a spreadsheet marks its UTF-8 with a byte order mark
        with source.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            _require_columns(source, columns, reader.fieldnames or ())
            rows = [[row[name] or "" for name in columns] for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ImageError(f"{source} is no table in UTF-8: {error}") from error
    return [[row[at] for row in rows] for at in range(len(columns))]


def _read_parquet(source: Path, columns: tuple[str, ...]) -> list[list[str]]:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise MissingPackageError(
            f"{source} needs pyarrow ({error}); pip install 'msn-export[parquet]', or give a .csv"
        ) from error
    try:
        with parquet.ParquetFile(source) as file:
            schema = file.schema_arrow
            _require_columns(source, columns, schema.names)
            for name in columns:
                kind = schema.field(name).type
                if pa.types.is_nested(kind) or pa.types.is_binary(kind):
                    raise ImageError(f"{source}: the column {name} is {kind}; expected text")
            _require_bounded(source, file.metadata, columns)
            table = file.read(list(columns))
    except (OSError, pa.ArrowException) as error:
        reason = str(error).partition("\n")[0]
        raise ImageError(f"{source} is no parquet file: {reason}") from error
    read = (table.column(name).to_pylist() for name in columns)
    return [["" if value is None else str(value) for value in values] for values in read]


def _require_bounded(source: Path, metadata: object, columns: tuple[str, ...]) -> None:
    """Refuse a file whose columns would not fit into memory once they are unpacked."""
    groups = [metadata.row_group(at) for at in range(metadata.num_row_groups)]  # type: ignore[attr-defined]
    chunks = [group.column(at) for group in groups for at in range(group.num_columns)]
    unpacked = sum(c.total_uncompressed_size for c in chunks if c.path_in_schema in columns)
    if unpacked > _UNPACKED or metadata.num_rows > _ROWS:  # type: ignore[attr-defined]
        raise ImageError(
            f"{source} has more than {_ROWS:,} rows, or {_UNPACKED >> 30} GiB of text; split it"
        )


def _require_columns(source: Path, columns: tuple[str, ...], names: Sequence[str]) -> None:
    lacking = [name for name in columns if name not in names]
    if lacking:
        held = ", ".join(map(shown, names[:8])) or "none"
        raise ImageError(
            f"{source} has no column {' and no column '.join(lacking)}; its columns are {held}"
        )
    twice = [name for name in columns if list(names).count(name) > 1]
    if twice:
        raise ImageError(f"{source} has two columns {twice[0]}; rename one")


def listed(names: Sequence[str], noun: str) -> str:
    """Count things, and name the first of them."""
    if not names:
        return ""
    first = ", ".join(map(shown, names[:_NAMED])) + (", …" if len(names) > _NAMED else "")
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{len(names)} {noun if len(names) == 1 else plural} ({first})"


def shown(name: str) -> str:
    """Write a name of a file so that it fits into a line."""
    name = name if len(name) <= _LONGEST else f"{name[:_LONGEST]}…"
    return name if name.isprintable() else ascii(name)
