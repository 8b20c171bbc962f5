"""``python -m msn_export``."""

from msn_export.cli import run

run()
