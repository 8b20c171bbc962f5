"""``msn-export embed`` whose embedders note every batch they ran, and may die or fail at one.

    python noted.py NOTES MISHAP AT COMMAND…

MISHAP: ``kill`` ends the worker that runs batch number AT, once; ``fail`` has the model fail from
that batch on; ``none``.
"""

import os
import signal
import sys
import time
from pathlib import Path

import ray

from msn_export.cli import main
from msn_export.cluster.cluster import RayExecutor, ShippedEmbedder
from msn_export.errors import DeviceError

NOTES, MISHAP, AT = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])


class Noted(ShippedEmbedder):
    """Notes the first row, the number of rows and the node of each batch, when it is done."""

    def run(self, record):
        noted = len(NOTES.read_text().splitlines()) if NOTES.exists() else 0
        if MISHAP == "fail" and noted >= AT:
            raise DeviceError("the drill's model failed")
        time.sleep(0.05)  # long enough to be in the middle of something
        made = super().run(record)
        node = ray.get_runtime_context().get_node_id()
        with NOTES.open("a") as file:
            file.write(f"{made['start']} {node} {os.getpid()}\n")
        if MISHAP == "kill" and noted >= AT:
            marker = NOTES.with_name("killed")
            try:
                marker.touch(exist_ok=False)
            except FileExistsError:
                return made
            os.kill(os.getpid(), signal.SIGKILL)
        return made


if __name__ == "__main__":
    RayExecutor.embedder = Noted  # of this module, so Ray sends it along
    main(sys.argv[4:])
