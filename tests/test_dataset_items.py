"""Lists of clips, and which frames of a clip go where: without Ray."""

from __future__ import annotations

import io
import json
import os
import pickle
import signal
import tarfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from clips import bars, make_video
from PIL import Image

from halovae.base.errors import InputError
from halovae.datasets import workers
from halovae.datasets.buckets import Bucket, ClipSize, choose, look, parse_areas, parse_buckets, take
from halovae.datasets.formats import scale
from halovae.datasets.items import Item, find_items
from halovae.datasets.units import group_sizes, units_of
from halovae.media import read
from halovae.media.latents_file import content_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    (folder / "sub").mkdir()
    (folder / ".hidden").mkdir()
    for name in ("a.mp4", "sub/b.mp4", ".hidden/c.mp4"):
        make_video(folder / name, frames=20)
    Image.fromarray(bars(1)[0]).save(folder / "i.png")
    (folder / "a.txt").write_text("bars move\n")
    (folder / "notes.pdf").write_text("no clip")
    return folder


def test_folder_and_pattern(folder: Path) -> None:
    found = find_items(str(folder))
    assert [item.key for item in found] == ["a.mp4", "i.png", "sub/b.mp4"]
    assert found[0].caption == "bars move"
    assert [item.key for item in find_items(f"{folder}/**/*.mp4")] == ["a.mp4", "sub/b.mp4"]


def test_manifests(folder: Path) -> None:
    rows = [
        {"path": "sub/b.mp4", "caption": "b", "frames": "5:20"},
        {"path": "sub/b.mp4", "caption": "b", "frames": "0:5"},
        {"path": str(folder / "a.mp4"), "caption": "a", "frames": ""},
    ]
    (folder / "m.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "m.csv").write_text("path,caption,frames\n" + "".join(f"{','.join(row.values())}\n" for row in rows))
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "m.parquet")
    found = {suffix: find_items(str(folder / f"m.{suffix}")) for suffix in ("jsonl", "csv", "parquet")}
    assert found["jsonl"] == found["csv"] == found["parquet"]
    assert [item.key for item in found["csv"]] == ["a.mp4", "sub/b_0-5.mp4", "sub/b_5-20.mp4"]
    assert look(found["csv"][2], None).frames == 15


def test_shards_of_a_webdataset(folder: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s-0.tar", "w") as shard:
        members = {"x/1.mp4": (folder / "a.mp4").read_bytes(), "x/1.json": b'{"caption": "one"}', "x/2.txt": b"two"}
        for name, data in {**members, "x/2.png": (folder / "i.png").read_bytes()}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            shard.addfile(member, io.BytesIO(data))
    found = find_items(str(tmp_path))
    assert [(item.key, item.caption) for item in found] == [("s-0/x/1.mp4", "one"), ("s-0/x/2.png", "two")]
    inside = take(found[0], Bucket(32, 48, 5), None)
    outside = take(find_items(str(folder))[0], Bucket(32, 48, 5), None)
    assert np.array_equal(inside.pixels, outside.pixels)


def test_names_stay_in_their_folder(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"path": "../../etc/x.mp4"}\n{"path": "/.secret/y.mp4"}\n')
    keys = [item.key for item in find_items(str(tmp_path / "m.jsonl"))]
    assert all(".." not in key and not key.startswith(("/", ".")) and "/." not in key for key in keys)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none", None, "does not exist"),
        ("m.jsonl", "{", "line 1 is no JSON"),
        ("m.jsonl", '{"caption": "a"}', "row 1 names no file"),
        ("m.jsonl", '{"path": "a.mp4", "frames": "5:2"}', "row 1: frames 5:2"),
        ("m.jsonl", '{"path": "a.mp4"}\n{"path": "a.mp4"}', "twice"),
        ("m.jsonl", "", "holds no clips"),
        ("m.parquet", "no", "can't read"),
        ("s.tar", "no", "no whole .tar file"),
    ],
)
def test_bad_lists(name: str, content: str | None, said: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=said):
        find_items(str(tmp_path / name))


def test_frames_at_a_rate_are_those_that_a_player_shows(folder: Path) -> None:
    """25 frames per second at 10: each moment shows the last frame that has begun."""
    item = find_items(str(folder))[0]
    assert look(item, Fraction(10)) == ClipSize(height=64, width=96, frames=8)
    taken = take(item, Bucket(64, 96, 8), Fraction(10))
    assert taken.done["source_frames"] == [0, 2, 5, 7, 10, 12, 15, 17]
    assert taken.fps == 10
    assert np.array_equal(taken.pixels, read(Path(item.path)).frames[taken.done["source_frames"]])
    twice = take(item, Bucket(64, 96, 9), Fraction(50))
    assert twice.done["source_frames"] == [0, 0, 1, 1, 2, 2, 3, 3, 4]


def test_what_was_done_is_told(folder: Path) -> None:
    taken = take(find_items(str(folder))[0], Bucket(64, 64, 3), None)
    assert taken.done == {
        "source_size": [64, 96], "crop": [16.0, 0.0, 80.0, 64.0], "source_frames": [0, 1, 2], "bucket": [3, 64, 64],
    }  # fmt: skip
    assert taken.fps == 25
    with pytest.raises(InputError, match="20 frames that can be taken, and not 21"):
        take(find_items(str(folder))[0], Bucket(64, 64, 21), None)


def test_buckets() -> None:
    buckets = parse_buckets(["480x832x81", "832x480x81", "480x832x17", "64x64", "512x512"])
    wide = ClipSize(height=1080, width=1920, frames=100)
    assert choose(wide, buckets) == Bucket(480, 832, 81)
    assert choose(ClipSize(height=1080, width=1920, frames=20), buckets) == Bucket(480, 832, 17)
    assert choose(ClipSize(height=500, width=500, frames=100), buckets).frames > 1, "a clip is no image"
    assert choose(ClipSize(height=1080, width=1920, frames=1), buckets) == Bucket(512, 512)
    assert choose(ClipSize(height=100, width=100, frames=1), buckets) == Bucket(64, 64), "not enlarged"
    with pytest.raises(InputError, match="it has 9 frames at this rate, and the shortest bucket has 17"):
        choose(ClipSize(height=64, width=64, frames=9), parse_buckets(["64x64x17"]))
    for text in ("480", "0x8x1", "ax8", "99999x99999x99"):
        with pytest.raises(InputError, match="--bucket"):
            parse_buckets([text])


def test_buckets_by_area() -> None:
    buckets = parse_areas(["480x832x81"], 32)
    assert {Bucket(480, 832, 81), Bucket(832, 480, 81), Bucket(608, 640, 81)} < set(buckets)
    for bucket in buckets:
        assert not bucket.height % 32
        assert not bucket.width % 32
        assert 0.9 < bucket.height * bucket.width / (480 * 832) <= 1
        assert 1 / 3 <= bucket.height / bucket.width <= 3
    assert choose(ClipSize(height=1080, width=1920, frames=100), buckets) == Bucket(480, 832, 81)
    assert choose(ClipSize(height=500, width=500, frames=100), buckets) == Bucket(608, 640, 81)
    assert len(parse_areas(["480x832x81", "480x832x17", "832x480x17"], 32)) == 2 * len(buckets)
    assert parse_areas(["64x96"], 32) == [Bucket(64, 96), Bucket(96, 64)]
    with pytest.raises(InputError, match="--bucket-area 16x16: smaller than a square of --bucket-step 32"):
        parse_areas(["16x16"], 32)


def test_what_ends_processes_is_not_begun_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even in another run: it may have ended all of this one. Then it has its chance again."""
    row, ended = {"item": pickle.dumps(find_items(str(folder))[0])}, []

    def end(*_: object) -> None:
        ended.append(True)
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(workers, "look", end)
        for _ in range(2):
            if not (child := os.fork()):
                workers.look_at(row, None, tmp_path)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert (
            json.loads(workers.look_at(row, None, tmp_path)["seen"])["why"]
            == "it has ended 2 processes that were at it"
        )
        assert not ended
    assert json.loads(workers.look_at(row, None, tmp_path)["seen"])["frames"] == 20
    assert not list(tmp_path.iterdir())


def test_units_are_the_same_whatever_is_finished() -> None:
    clips = [(Item(key=f"{n:02}", path=""), Bucket(64, 64)) for n in range(11)]
    clips.append((Item(key="clip", path=""), Bucket(480, 832, 81)))
    first, *images = units_of(clips, set())
    assert first.keys == ["clip"]
    assert [len(unit.items) for unit in images] == [8, 3]
    (left,) = units_of(clips, {"clip", *(f"{n:02}" for n in range(11) if n != 9)})
    assert left.items == images[1].items
    assert left.keys == ["09"]
    assert [group_sizes(n) for n in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


def test_scaling_there_and_back() -> None:
    latents = torch.randn(1, 3, 2, 4, 4, dtype=torch.float64)
    for scaling in (
        {"latents_mean": [0.5, -1, 2], "latents_std": [2, 3, 0.5]},
        {"scaling_factor": 0.3, "shift_factor": 0.1},
        {},
    ):
        assert torch.allclose(scale(scale(latents, scaling), scaling, undo=True), latents, atol=1e-12)
    assert float(scale(torch.ones(1, 1, 2, 2), {"scaling_factor": 2.0, "shift_factor": 0.5}).mean()) == 1.0


def test_equal_latents_make_equal_files() -> None:
    metadata = {name: name * 2 for name in "hgfedcba"}
    content = content_of({"latents": torch.arange(3.0)}, metadata)
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    assert list(json.loads(content[8 : 8 + length])["__metadata__"]) == list(metadata)
