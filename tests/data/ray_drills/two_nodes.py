"""Two nodes, of which the second goes while both work.

    python two_nodes.py NOTES COMMAND…

Runs noted.py on both, removes the second node without notice when it has done a third of what there
is, and prints which nodes there were.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

from ray.cluster_utils import Cluster

NOTES, BATCHES = Path(sys.argv[1]), int(sys.argv[2])


def noted(node: str) -> int:
    lines = NOTES.read_text().splitlines() if NOTES.exists() else []
    return sum(line.split()[1] == node for line in lines)


def main() -> int:
    each = {"num_cpus": 2, "object_store_memory": 200 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**each, "include_dashboard": False})
    second = cluster.add_node(**each)
    cluster.wait_for_nodes()
    noted_py = Path(__file__).with_name("noted.py")
    command = [
        sys.executable,
        noted_py,
        NOTES,
        "none",
        "0",
        *sys.argv[3:],
        "--ray",
        cluster.address,
    ]
    try:
        with subprocess.Popen(list(map(str, command)), text=True) as run:
            until = time.monotonic() + 120
            while noted(second.node_id) < BATCHES // 6 and time.monotonic() < until:
                if run.poll() is not None:
                    break
                time.sleep(0.02)
            alive = run.poll() is None
            cluster.remove_node(second, allow_graceful=False)
            before = noted(second.node_id)
            code = run.wait(180)
    finally:
        cluster.shutdown()
    told = {"removed": second.node_id, "in_the_middle": alive, "by_removed": before}
    sys.stdout.write(json.dumps(told) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
