"""Runs a probe in a process of its own, over the fake library that LD_LIBRARY_PATH leads to.

Lines of JSON on stdin: ``{"state": text}`` writes the state, polls, and answers with the faults and gaps;
``{"advance": seconds}`` moves the probe's clock. First argument: the kind of card; the rest: visible devices.
"""

import json
import os
import sys

from resilience.cards import health
from resilience.cards.probe import open_probe
from resilience.errors import UnavailableError

clock = [1000.0]
_levels = health.Levels.__init__


def levels(self, _clock, hold_s=0.0):
    _levels(self, lambda: clock[0], hold_s)


health.Levels.__init__ = levels
probe = None
for line in sys.stdin:
    told = json.loads(line)
    clock[0] += told.get("advance", 0.0)
    if "state" in told:
        with open(os.environ["FAKE_CARDS"], "w") as file:
            file.write(told["state"])
    try:
        probe = probe or open_probe(sys.argv[1], sys.argv[2:])
        faults = [[f.index, f.code, list(f.affects)] for f in probe.poll()]
        answer = {"faults": faults, "gaps": probe.gaps(), "probe": type(probe).__name__}
    except UnavailableError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer), flush=True)
