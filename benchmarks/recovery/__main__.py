"""``python -m benchmarks.recovery``: from the kill of a rank to the first new step, ours and the peers'."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.recovery import harness

# Name → module and the function in it that gives the command. Loaded late: no system pays for another.
SYSTEMS = {
    "ours": ("benchmarks.recovery.ours", "command"),
    "torchrun": ("benchmarks.recovery.torchrun", "command"),
    "raytrain": ("benchmarks.recovery.ray_train", "command"),
    "raytrain-fast": ("benchmarks.recovery.ray_train", "fast_command"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--system", choices=[*SYSTEMS, "all"], nargs="+", default=["all"])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints")
    parser.add_argument("--out", type=Path, default=report.RESULTS / "recovery.json")
    parser.add_argument("--keep", action="store_true", help="keep the working directory")
    arguments = parser.parse_args()
    names = list(SYSTEMS) if "all" in arguments.system else arguments.system
    versions: set[str] = set()
    results: list[dict[str, Any]] = []
    root = Path(tempfile.mkdtemp(prefix="recovery-"))
    note = report.machine("resilience", "ray", "torch")
    try:
        for name in names:
            print(f"{name}: {arguments.kills} kills", flush=True)
            where, function = SYSTEMS[name]
            module = import_module(where)
            versions.update(module.VERSIONS)
            results.append(
                harness.measure(
                    name,
                    getattr(module, function),
                    root / name,
                    kills=arguments.kills,
                    environment=getattr(module, "ENVIRONMENT", {}),
                    ranks=arguments.ranks,
                    every=arguments.every,
                )
            )
    finally:
        if arguments.keep:
            print(f"kept {root}")
        else:
            shutil.rmtree(root)
    report.write(arguments.out, {"benchmark": "recovery", "machine": note, "systems": results})
    _table(results)


def _table(results: list[dict[str, Any]]) -> None:
    heads = ("kills", "step ms", "first p50", "p95", "regained p50", "p95")
    print(f"{'system':15}" + "".join(f"{head:>14}" for head in heads))
    for result in results:
        first, regained = result["first_step_s"], result["regained_s"]
        if first:
            times = (first["p50"], first["p95"], regained["p50"], regained["p95"])
            row = "".join(f"{value:14.2f}" for value in times)
            print(f"{result['system']:15}{len(result['kills']):14}{result['step_s'] * 1e3:14.0f}{row}")
        if "failed" in result:
            print(f"{result['system']}: FAILED: {result['failed']}")


if __name__ == "__main__":
    main()
