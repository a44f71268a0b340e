"""One process of a distributed test: gloo, one thread. Run by ``conftest.ranks``.

``python <cases>.py RANK PORT PHASES`` goes through phases, ``[function, world, arguments]`` each: it is a rank of a new
process group of ``world`` ranks in it, or idle; starting processes anew would take most of the time. Prints what the
functions return, as JSON. A process ends with ``os._exit``: gloo's threads may abort one that ends while they run.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.distributed as dist


def main(cases: Mapping[str, Any]) -> None:
    rank, port, phases = int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    torch.set_num_threads(1)
    everybody = max(world for _, world, _ in phases)
    store = dist.TCPStore("127.0.0.1", port, everybody, is_master=rank == 0)
    code, results = 0, []
    try:
        for number, (function, world, arguments) in enumerate(phases):
            result = None
            if rank < world:
                own = dist.PrefixStore(f"phase-{number}", store)
                dist.init_process_group("gloo", store=own, rank=rank, world_size=world)
                result = cases[function](**arguments)
                dist.barrier()
                dist.destroy_process_group()
            results.append(result)
            store.set(f"done-{number}-{rank}", "")
            store.wait([f"done-{number}-{other}" for other in range(everybody)])
    except BaseException:
        traceback.print_exc()
        code = 1
    print(json.dumps(results), flush=True)
    sys.stderr.flush()
    if not code:
        store.set(f"end-{rank}", "")
        if rank == 0:  # it holds the store
            store.wait([f"end-{other}" for other in range(everybody)])
    os._exit(code)
