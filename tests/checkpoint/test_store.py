"""Our own store: opens runs and copied directories, checks CRCs, and raises where Zarr would return zeros."""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zarr.abc.store import OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import default_buffer_prototype

from resilience.checkpoint.box import Box
from resilience.checkpoint.part import Part
from resilience.checkpoint.restore import Source
from resilience.checkpoint.shard import Shard
from resilience.checkpoint.store import PackStore, open_checkpoint
from resilience.errors import CorruptError, InvalidError
from resilience.journal.log import CommitLog
from resilience.journal.records import Kind
from storage_backends import Storage, open_storage

Save = Callable[..., list[Source]]
W = torch.arange(24, dtype=torch.float32).reshape(6, 4)
WHERE = "checkpoints/step-10-g1"


def states(scale: float = 1.0) -> list[dict[str, object]]:
    return [{"model": {"w": W * scale, "h": W.bfloat16()}, "own": np.array([rank])} for rank in range(2)]


def commit(storage: Storage, step: int, sources: list[Source], tier: str = "shared") -> None:
    ids = itertools.count()
    log = CommitLog(storage, new_id=lambda: f"{step}-{tier}-{next(ids)}")
    log.refresh()
    log.fence(1 + step, {"run": "run-1", "supervisor": "test", "reason": "test"})
    body = {
        "step": step,
        "generation": 1,
        "tier": tier,
        "world_size": len(sources),
        "parts": [
            {"rank": source.rank, "node": "n", "name": source.part, "sha256": source.sha256}
            for source in sources
        ],
        "size": 1,
    }
    log.append(Kind.CHECKPOINT, body)


def test_the_newest_committed_checkpoint_of_a_run(save: Save, storage: Storage) -> None:
    for step in (10, 20):
        commit(storage, step, save(states(step), replicated=("model",), step=step))
    save(states(), replicated=("model",), step=30)  # durable, never committed: it does not exist
    commit(storage, 40, save(states(), replicated=("model",), step=40), tier="nvme")
    group = open_checkpoint(storage.url)
    assert isinstance(group, zarr.Group)
    assert group.attrs["resilience"]["step"] == 20
    assert np.array_equal(group["model/w"][:], W.numpy() * 20)
    assert group["model/h"].dtype.name == "bfloat16"
    assert np.array_equal(group["model/h"][2:4].astype(np.float32), W[2:4].numpy())
    assert [group[f"rank-{rank}/own"][0] for rank in range(2)] == [0, 1]
    assert open_checkpoint(storage.url, step=10).attrs["resilience"]["step"] == 10
    with pytest.raises(InvalidError, match="step 30") as caught:
        open_checkpoint(storage.url, step=30)
    assert "20, 10" in str(caught.value.hint)


def test_a_copied_directory(save: Save, storage: Storage, tmp_path: Path) -> None:
    save(states(), replicated=("model",))
    where = storage.path(WHERE)
    assert where is not None
    where.rename(tmp_path / "copy")
    group = open_checkpoint(str(tmp_path / "copy"))
    assert np.array_equal(group["model/w"][:], W)
    with pytest.raises(CorruptError, match="expected is 11"):
        open_checkpoint(str(tmp_path / "copy"), step=11)
    (tmp_path / "copy" / "rank-1.json").unlink()
    with pytest.raises(CorruptError):
        open_checkpoint(str(tmp_path / "copy"))
    with pytest.raises(InvalidError, match="neither"):
        open_checkpoint(str(tmp_path / "nothing"))


def test_nothing_missing_or_damaged_reads_as_zeros(
    save: Save, storage: Storage, load: Callable[[Source], Part], edit: Callable[[str, int, bytes], None]
) -> None:
    sources = save(states(), replicated=("model",), chunk_bytes=32)
    parts = [load(source) for source in sources]
    group = open_checkpoint(f"{storage.url}/{WHERE}")
    part, chunk = next(
        (part, chunk)
        for part in parts
        for chunk in part.chunks
        if (part.arrays[chunk.array].name, chunk.box_offset) == ("model/w", (2, 0))
    )
    edit(part.pack_name, chunk.offset, b"\x99")
    assert np.array_equal(group["model/w"][:2], W[:2])
    with pytest.raises(CorruptError) as caught:
        group["model/w"][:]
    assert (caught.value.start, caught.value.end) == (chunk.offset, chunk.offset + chunk.length + 4)
    storage.delete(part.pack_name)
    with pytest.raises(CorruptError):
        group["model/w"][2:4]


def test_a_chunk_in_no_pack_raises(save: Save, load: Callable[[Source], Part]) -> None:
    """Plain Zarr takes a missing key for a chunk of zeros."""
    (source,) = save([{"w": W}], replicated=("w",), chunk_bytes=32)
    part = load(source)
    store = PackStore([replace(part, chunks=part.chunks[:-1])], [(source.storage, part.pack_name)])
    array = zarr.open_group(store, mode="r")["w"]
    assert np.array_equal(array[:4], W[:4])
    with pytest.raises(CorruptError, match="in no pack"):
        array[:]


def test_as_a_zarr_store(save: Save, load: Callable[[Source], Part]) -> None:
    """Listing, sizes, byte ranges; and nothing can be written."""
    sources = save(states(), replicated=("model",))
    parts = [load(source) for source in sources]
    packs = [(source.storage, part.pack_name) for source, part in zip(sources, parts, strict=True)]
    store = PackStore(parts, packs)
    assert store == PackStore(parts, packs)
    assert store != PackStore(parts, packs[::-1])
    assert "step=10" in repr(store)

    async def check() -> None:
        prototype = default_buffer_prototype()
        assert sorted([key async for key in store.list_dir("")]) == ["model", "rank-0", "rank-1", "zarr.json"]
        assert sorted([key async for key in store.list_dir("model/w")]) == ["c", "zarr.json"]
        keys = [key async for key in store.list()]
        assert len(keys) == len(set(keys))
        for key in keys:
            whole = await store.get(key, prototype)
            assert whole is not None
            data = whole.to_bytes()
            assert await store.exists(key)
            assert await store.getsize(key) == len(data)
            ranges = (RangeByteRequest(1, 3), OffsetByteRequest(2), SuffixByteRequest(3))
            cut = await store.get_partial_values(prototype, [(key, wanted) for wanted in ranges])
            assert [part.to_bytes() for part in cut if part] == [data[1:3], data[2:], data[-3:]]
        assert await store.get("nothing/zarr.json", prototype) is None
        assert not await store.exists("nothing/zarr.json")
        for write in (store.set("a", None), store.delete("a")):  # type: ignore[arg-type]
            with pytest.raises(ValueError, match="read-only"):
                await write

    asyncio.run(check())


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An S3 server on loopback with one bucket."""
    boto3 = pytest.importorskip("boto3")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    boto3.client("s3").create_bucket(Bucket="runs")
    yield "s3://runs/run-1"
    server.stop()


@pytest.mark.s3
def test_an_object_store(save: Save, bucket: str) -> None:
    target = open_storage(bucket)
    commit(target, 10, save(states(), replicated=("model",), to=target))
    group = open_checkpoint(bucket)
    assert np.array_equal(group["model/w"][:], W)
    assert np.array_equal(open_checkpoint(f"{bucket}/{WHERE}")["rank-1/own"][:], [1])
    target.close()


@st.composite
def coverings(draw: st.DrawFn) -> tuple[tuple[int, ...], list[list[Box]]]:
    """A shape, and random disjoint boxes that cover it, dealt to a few ranks."""
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    boxes = [Box.whole(shape)]
    for _ in range(draw(st.integers(0, 8))):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        axis = draw(st.integers(0, len(shape) - 1))
        at = draw(st.integers(0, box.shape[axis]))
        low = Box(box.offset, (*box.shape[:axis], at, *box.shape[axis + 1 :]))
        boxes += [each for each in (low, *box.without(low)) if each.count]
    ranks: list[list[Box]] = [[] for _ in range(draw(st.integers(1, 4)))]
    for box in boxes:
        ranks[draw(st.integers(0, len(ranks) - 1))].append(box)
    return shape, ranks


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(coverings(), st.integers(8, 200))
def test_boxes_of_any_kind_read_as_one_array(
    save: Save, covering: tuple[tuple[int, ...], list[list[Box]]], chunk_bytes: int
) -> None:
    """Random coverings in, the same bits out, from a store that was never given a grid."""
    shape, ranks = covering
    w = np.random.default_rng(len(ranks)).standard_normal(shape).astype(np.float32)
    states = []
    for boxes in ranks:
        local = np.concatenate([w[box.slices(Box.whole(shape))].ravel() for box in boxes] or [w[:0].ravel()])
        states.append({"w": Shard(local, shape, tuple(boxes))})
    target = open_storage(f"memory://{uuid.uuid4().hex}")
    save(states, chunk_bytes=chunk_bytes, to=target)
    array = open_checkpoint(f"{target.url}/{WHERE}")["w"]
    assert np.array_equal(array[...], w)
    assert np.array_equal(array[..., :2], w[..., :2])


def test_a_chunk_of_flat_ranges_is_checked_and_never_half_filled(
    save: Save, storage: Storage, load: Callable[[Source], Part], edit: Callable[[str, int, bytes], None]
) -> None:
    w = np.arange(1, 61, dtype=np.float32).reshape(12, 5)
    flat = w.ravel()
    cuts = [0, 13, 41, 60]
    states = [{"w": Shard.flat(flat[a:b], shape=w.shape, start=a)} for a, b in itertools.pairwise(cuts)]
    sources = save(states)
    url = f"{storage.url}/{WHERE}"
    assert np.array_equal(open_checkpoint(url)["w"][:], w)
    parts = [load(source) for source in sources]
    packs = [(source.storage, part.pack_name) for source, part in zip(sources, parts, strict=True)]
    lost = [replace(parts[0], chunks=parts[0].chunks[:-1]), *parts[1:]]
    array = zarr.open_group(PackStore(lost, packs), mode="r")["w"]
    with pytest.raises(CorruptError, match=r"w lacks the box of shape \[.*\] at \[2, 0\]"):
        array[:]
    edit(parts[1].pack_name, 0, b"\x99")
    with pytest.raises(CorruptError, match="CRC32C"):
        open_checkpoint(url)["w"][:]


def test_ranks_that_describe_an_array_differently(save: Save, storage: Storage) -> None:
    """Pipeline stages know different arrays; those that know the same one must agree."""
    states = [
        {"w": Shard.at(W.numpy()[:3], shape=(6, 4), offset=(0, 0))},
        {"w": Shard.at(W.numpy()[3:].astype(np.float64), shape=(6, 4), offset=(3, 0))},
    ]
    save(states)
    with pytest.raises(CorruptError, match=r"rank-1\.json has w as float64"):
        open_checkpoint(f"{storage.url}/{WHERE}")


def test_tensor_parallel_columns_are_read_once_each(save: Save, storage: Storage) -> None:
    """The grid given to boxes is the one they keep to, where there is one."""
    w = np.arange(64, dtype=np.float32).reshape(8, 8)
    save([{"w": Shard.at(w[:, 4 * r : 4 * r + 4], shape=(8, 8), offset=(0, 4 * r))} for r in range(2)])
    array = open_checkpoint(f"{storage.url}/{WHERE}")["w"]
    assert array.chunks == (8, 4)
    assert np.array_equal(array[:], w)
