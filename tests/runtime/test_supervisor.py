"""The supervisor's own end, in a process of its own and without Ray."""

import json
import os
import subprocess
import sys
from dataclasses import asdict

import pytest

from resilience.control.types import Policy

ENDED = """
import json, sys, threading
from resilience.runtime import supervisor as module
module._ORPHAN_S, module._LEAVE_S = json.loads(sys.argv[2])
it = module.Supervisor(json.loads(sys.argv[1]))
it._supervise = lambda: None  # the run is over
threading.Thread(target=it._loop).start()
sys.stdin.readline()
print("ending takes long", flush=True)
it._wind_down()
if sys.argv[3] == "collected":
    it.collected()
threading.Event().wait()
"""


@pytest.mark.parametrize(
    ("patience", "collected"),
    [((0.0, 1000.0), ""), ((1000.0, 0.0), "collected")],
    ids=["nobody comes for the outcome", "who had it died before it took the supervisor down"],
)
def test_it_leaves_by_itself_but_not_before_it_has_ended(tmp_path, patience, collected):
    spec = {
        "run": f"ended-{os.getpid()}",
        "env": {},
        "policy": asdict(Policy(workers=1)),
        "shared": str(tmp_path),
        "faults": [],
        "fault_codes": {},
        "nvme": None,
        "card": "card",
    }
    process = subprocess.Popen(
        [sys.executable, "-c", ENDED, json.dumps(spec), json.dumps(patience), collected],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        out, _ = process.communicate("\n", timeout=120)
    finally:
        process.kill()
        process.wait()
    assert out == "ending takes long\n"
    assert process.returncode == 0
