"""``python -m msn_export``."""

from msn_export.cli import main

main(prog_name="msn-export")
