"""Saving and restoring, ours and the peers', each made durable, as ratios to what the device did at that time.

Every system runs in a process of its own, in another order in every round; in it the device is measured before and
after the saves. A save ends when the bytes and their directory entries are on the device; a restore begins with
the files dropped from the page cache and ends when existing tensors hold the saved bytes, which is checked. One
process makes four saves and keeps the two newest: the first go into new files, the later ones may use what the
earlier ones left, where a system can.

    python -m benchmarks.checkpoint --directory /a/directory/on/the/disk/to/measure --gib 2
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import report
from benchmarks.checkpoint import systems


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--directory", default=os.getcwd(), help="where to write; default: the current directory"
    )
    parser.add_argument("--gib", type=float, default=2.0, help="of state")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--saves", type=int, default=4, help="of each system in each round, at least 3")
    parser.add_argument("--system", nargs="+", choices=systems.SYSTEMS, default=list(systems.SYSTEMS))
    parser.add_argument("--out", type=Path, default=report.RESULTS / "checkpoint.json")
    arguments = parser.parse_args()
    note = report.machine(
        "resilience", "torch", "numpy", "safetensors", "orbax-checkpoint", "tensorstore", "zarr"
    )
    results: dict[str, list[dict[str, Any]]] = {}
    names = []
    for name in arguments.system:
        if (package := systems.missing(name)) is not None:
            print(f"{name}: skipped, {package} is not installed (pip install -e '.[bench]')")
        else:
            names.append(name)
            results[name] = []
    for number in range(arguments.rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            results[name].append(_child(name, arguments))
            print(f"round {number + 1}: {name}: {_short(results[name][-1])}", flush=True)
    report.write(
        arguments.out, {"benchmark": "checkpoint", "machine": note, "gib": arguments.gib, "systems": results}
    )
    table(results)


def _child(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.checkpoint.child", name, "--directory", arguments.directory]
    command += ["--gib", str(arguments.gib), "--saves", str(arguments.saves)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _short(result: dict[str, Any]) -> str:
    saves = " ".join(f"{save['save_s']:.2f}" for save in result["saves"])
    device = " ".join(f"{d['new_s']:.2f}/{d['over_s']:.2f}/{d['read_s']:.2f}" for d in result["device"])
    return f"saves {saves} s, restore {result['restore']['restore_s']:.2f} s, device new/over/read {device} s"


def figures(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over the rounds; each round's ratio is to its own device, the faster of before and after."""

    def over(get: Any) -> float:
        return median(get(run) for run in runs)

    def raw(run: dict[str, Any], key: str) -> float:
        return min(device[key] for device in run["device"])

    def steady(run: dict[str, Any], key: str) -> float:
        return median(save[key] for save in run["saves"][2:])

    found = {
        "first_s": over(lambda run: run["saves"][0]["save_s"]),
        "first_ratio": over(lambda run: raw(run, "new_s") / run["saves"][0]["save_s"]),
        "steady_s": over(lambda run: steady(run, "save_s")),
        "steady_ratio": over(lambda run: raw(run, "over_s") / steady(run, "save_s")),
        "stall_s": over(lambda run: steady(run, "stall_s")),
        "restore_s": over(lambda run: run["restore"]["restore_s"]),
        "restore_ratio": over(lambda run: raw(run, "read_s") / run["restore"]["restore_s"]),
        "cpu_s_per_gb": over(lambda run: steady(run, "cpu_s") / run["size"] * 1e9),
        "extra_mib": over(lambda run: steady(run, "extra_bytes") / 2**20),
    }
    if "copy_s" in runs[0]:
        found["stall_ratio"] = over(lambda run: steady(run, "stall_s") / run["copy_s"])
    return found


def table(results: dict[str, list[dict[str, Any]]]) -> None:
    every = [run for runs in results.values() for run in runs]
    gb = every[0]["size"] / 1e9
    best = {
        key: median(min(d[key] for d in run["device"]) for run in every)
        for key in ("new_s", "over_s", "read_s")
    }
    print(
        f"{gb:.2f} GB; device: new file {gb / best['new_s']:.2f} GB/s, overwritten {gb / best['over_s']:.2f}, ",
        end="",
    )
    print(f"read {gb / best['read_s']:.2f}; ratios are to the device in the same process, medians")
    print(
        f"{'':12}{'first s':>8}{'/new':>6}{'steady s':>10}{'/over':>6}{'stall s':>9}{'restore s':>11}", end=""
    )
    print(f"{'/read':>6}{'CPU s/GB':>10}{'extra MiB':>11}")
    for name, runs in results.items():
        f = figures(runs)
        print(
            f"{name:12}{f['first_s']:8.2f}{f['first_ratio']:6.2f}{f['steady_s']:10.2f}{f['steady_ratio']:6.2f}",
            end="",
        )
        print(
            f"{f['stall_s']:9.3f}{f['restore_s']:11.2f}{f['restore_ratio']:6.2f}{f['cpu_s_per_gb']:10.2f}",
            end="",
        )
        print(f"{f['extra_mib']:11.0f}")
        if "stall_ratio" in f:
            copy = median(run["copy_s"] for run in runs)
            print(
                f"{'':12}one copy of the state by two threads {copy:.3f} s; stall / copy {f['stall_ratio']:.2f}"
            )


if __name__ == "__main__":
    main()
