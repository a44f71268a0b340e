"""A whole run on an object store: a real S3 server, credentials handed over by ``env=``, a rank killed on the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import resilience
from chaos.faults import kill

pytestmark = [pytest.mark.ray, pytest.mark.s3]

RUN = f"on-s3-{os.getpid()}"  # several sessions may run on one machine
STEPS, SIZE = 23, 3000

PLAIN_ZARR = """
import json, sys
import zarr
from zarr.storage import FsspecStore
options = {"fo": f"{sys.argv[1]}/refs.json"}
options |= {"remote_protocol": "s3", "remote_options": {"asynchronous": True}, "target_options": {}}
group = zarr.open_group(FsspecStore.from_url("reference://", storage_options=options), mode="r")
print(json.dumps({r: group[f"rank-{r}/state/table"][...].tolist() for r in range(2)}))
"""


def test_a_run_on_s3_outlives_a_kill_and_everything_reads_it(
    cluster, driven, chaos, drive, aws, bucket, cli, committed, records, assert_exact, tmp_path
):
    storage = f"s3://{bucket}/some/runs"
    drive.allow(STEPS)
    result = chaos.run(
        driven,
        [kill(1, step=12)],
        arguments={"control": str(drive.directory), "steps": STEPS, "size": SIZE, "talk": True},
        name=RUN,
        storage=storage,
        nvme=None,
        env=aws,
        keep_last=50,
    )
    assert result.finished
    assert result.value == STEPS
    url = f"{storage}/{RUN}"
    assert_exact(resilience.open_checkpoint(url), steps=STEPS, size=SIZE)
    (incident,) = result.incidents
    assert (incident["kind"], incident["rank"]) == ("signal", 1)
    assert incident["tier"] in ("shared", None)

    # What the command line says of it, with nothing but the storage URL and the environment.
    whole = cli("verify", RUN, "--storage", storage, "--json")
    assert whole.returncode == 0, whole.stdout + whole.stderr
    verdicts = json.loads(whole.stdout)
    assert {c["verdict"] for c in verdicts["checkpoints"]} == {"whole"}
    assert {c["step"] for c in verdicts["checkpoints"]} >= {20, STEPS}
    status = cli("status", RUN, "--storage", storage, "--json")
    assert status.returncode == 0, status.stderr
    assert "finished" in status.stdout
    history = cli("history", RUN, "--storage", storage, "--json")
    assert history.returncode == 0, history.stderr
    assert len(json.loads(history.stdout)["incidents"]) == 1
    listed = cli("history", "--storage", storage)
    assert RUN in listed.stdout, listed.stdout + listed.stderr
    for generation, step in ((1, 0), (2, STEPS - 1)):
        logs = cli("logs", RUN, "--storage", storage, "--generation", generation, "--rank", 0)
        assert f"rank 0 at step {step} " in logs.stdout, (generation, logs.stderr)

    # And plain zarr over fsspec (that it needs none of this package is proved in tests/checkpoint).
    (generation,) = {g for step, g, _tier in committed(storage, RUN) if step == STEPS}
    read = subprocess.run(
        [sys.executable, "-c", PLAIN_ZARR, f"{url}/checkpoints/step-{STEPS}-g{generation}"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
    )
    assert read.returncode == 0, read.stderr
    group = resilience.open_checkpoint(url)
    for rank, values in json.loads(read.stdout).items():
        assert np.array_equal(values, group[f"rank-{rank}/state/table"][...])

    # One damaged byte in the bucket is named too.
    import boto3

    client = boto3.client("s3")
    key = f"some/runs/{RUN}/checkpoints/step-{STEPS}-g{generation}/rank-1.pack"
    body = bytearray(client.get_object(Bucket=bucket, Key=key)["Body"].read())
    body[100] ^= 1
    client.put_object(Bucket=bucket, Key=key, Body=bytes(body))
    damaged = cli("verify", RUN, "--storage", storage, "--step", STEPS)
    assert damaged.returncode == 1
    assert f"step-{STEPS}-g{generation}/rank-1.pack bytes 0.." in damaged.stdout
