"""Embed a folder of pictures, and print for each query the pictures that are most similar."""

import argparse
import sys
from pathlib import Path

from pyarrow import parquet
from usearch.index import Index

import msn_export
from msn_export.errors import MsnExportError
from msn_export.runtime import open_runner


def search(model: Path, folder: Path, queries: list[Path], count: int) -> None:
    table, index = folder.with_suffix(".parquet"), folder.with_suffix(".usearch")
    if not index.exists():  # made once; with --force again after pictures were added
        found = msn_export.embed(model, folder, index)
        print(f"{found.images} pictures, {found.broken} broken, {found.skipped or 'none skipped'}")
    rows = parquet.read_table(table, columns=["root", "path"])
    vectors = Index.restore(str(index), view=True)
    with open_runner(model) as runner:
        for query, vector in zip(queries, runner(queries).embedding, strict=True):
            print(query)
            for match in vectors.search(vector, count):
                print(f"  {1 - match.distance:.3f}  {rows['path'][int(match.key)]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="exported with --head cls")
    parser.add_argument("folder", type=Path, help="of pictures")
    parser.add_argument("queries", type=Path, nargs="+", help="pictures to look for")
    parser.add_argument("-k", type=int, default=5, help="how many for each")
    given = parser.parse_args()
    try:
        search(given.model, given.folder, given.queries, given.k)
    except MsnExportError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
