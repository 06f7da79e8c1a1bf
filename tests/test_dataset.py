"""`halovae encode-dataset` with a real Ray on this machine, which all tests here share: real files, real kills."""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import psutil
import pytest
import ray
import torch
from clips import bars, make_video
from command import PATIENCE, end_with_parent, enter, run, saved, start
from PIL import Image
from ray import cloudpickle
from ray._private import worker as ray_worker
from servers import disk
from torch import Tensor

from halovae.base.files import write_json
from halovae.cli.main import main
from halovae.datasets import Latents, groups, workers
from halovae.datasets.buckets import Bucket, take
from halovae.datasets.cluster import store_bytes
from halovae.datasets.forecast import needs, plan
from halovae.datasets.formats import Storage
from halovae.datasets.items import Item, find_items
from halovae.datasets.run_dataset import DatasetRun
from halovae.datasets.shards import keys_in, pack
from halovae.datasets.units import Job, Unit, units_of
from halovae.media import codec, latents_file, models, vae_limits, write

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Of Ray's own.

BUCKETS = [f"--bucket={size}" for size in ("64x96x5", "64x96", "128x192x5", "192x288x5")]
CLIPS = 6
FATAL = "sub/5.mp4"
"""Ends each process that reads it, as a broken file does with a decoder that has an error."""
LARGER = {"large.mp4": (192, 288), "starving.mp4": (128, 192)}
"""Height and width of those that no device alone encodes; of the others they are 64 and 96."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Ray with one processor more than the devices and the reader of a test need.

    What one process finds out about the VAE, the next ones know, as those of a user.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN", "0" * 64)
        patch.setenv("HALOVAE_CACHE", "")
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        context = ray.init(
            num_cpus=4, num_gpus=0, object_store_memory=80 * 2**20, include_dashboard=False, log_to_driver=False,
            configure_logging=False, logging_level="ERROR",
            # Its processes would get a processor only where no other test wants one.
            _system_config={"prestart_worker_first_driver": False, "worker_niceness": 0},
        )  # fmt: skip
        yield context.address_info["gcs_address"]
        ray.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved("wan21", tmp_path_factory.mktemp("models") / "wan")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips, images and a broken one."""
    folder = tmp_path_factory.mktemp("dataset") / "clips"
    (folder / "sub").mkdir(parents=True)
    for number in range(CLIPS):
        make_video(folder / "sub" / f"{number}.mp4", frames=7 + number)
    for number in range(3):
        Image.fromarray(bars(2)[number % 2]).save(folder / f"{number}.png")
    (folder / "0.txt").write_text("columns")
    (folder / "broken.mp4").write_bytes(b"no video")
    return folder


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return enter(tmp_path, monkeypatch)


def layout_of(model: str, **changes: str) -> Storage:
    vae = models.find_skeleton(model)[1]
    given = {"folder": "o", "format": "safetensors", "store": "mode", "dtype": "float32", **changes}
    return Storage(model=model, model_class="AutoencoderKLWan", scaling=latents_file.scaling_of(vae.config), **given)


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.safetensors")}


def undisturbed(folder: Path, model: str, clips: Path) -> dict[str, bytes]:
    """What the steps make of the clips, one after the other in this process."""
    job = Job(
        layout=layout_of(model, folder=str(folder), dtype="float64"), device="cpu", dtype="float64", fps=None, threads=1
    )
    device = workers.Device(job)
    items = [item for item in find_items(str(clips)) if item.key != "broken.mp4"]
    for unit in units_of([(item, Bucket(64, 96, 5 if item.key.endswith("mp4") else 1)) for item in items], set()):
        row = workers.read_unit({"unit": pickle.dumps(unit)}, job)
        made = device.encode(row.pop("pixels"))
        told = workers.write_unit({**row, "latents": made.pop("latents"), "made": json.dumps(made)}, job)
        assert {result["what"] for result in json.loads(told["told"])["results"]} == {workers.DONE}
    return files(folder)


def test_kills_and_groups_give_the_same_bytes_once(
    cluster: str, model: str, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The driver is killed at its second item. The next run goes on, on two devices: an encoder is killed, one clip
    ends each process that reads it, one finds too little memory on a device alone, and one is planned for two."""
    output = clips.parent / "killed"
    words = ["encode-dataset", str(clips), "-o", str(output), "--model", model, *BUCKETS, "--dtype", "float64"]
    with start(*words, "--ray-address", cluster, preexec_fn=end_with_parent) as driver:
        expected = undisturbed(tmp_path / "expected", model, clips)
        deadline = time.monotonic() + PATIENCE
        while len(files(output)) < 2 and driver.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        driver.kill()
        said = driver.communicate()
    assert driver.returncode == -signal.SIGKILL, said
    (output / f"latents/{FATAL}.safetensors").unlink(missing_ok=True)
    first = {path: os.stat(output / path).st_mtime_ns for path in files(output)}
    for name, size in LARGER.items():
        write(clips / name, bars(5, *size), Fraction(25))
    job = Job(layout=layout_of(model, dtype="float64"), device="cpu", dtype="float64", fps=None, threads=1)
    large = Bucket(192, 288, 5)
    (alone,) = needs(job, [large], 1, 1.0, timed=False)
    limits = vae_limits.limits_of(models.find_skeleton(model)[1])
    assert "on no number of devices" in plan({large: alone}, Counter([large]), 1, limits, job.layout)[0]
    room = str((alone.bytes - 1) / 2**30)
    with sabotage():
        assert main([*words, "--devices", "2", "--memory", room, "--json", "run.json", "--report", "report"]) == 0
    found = files(output)
    del expected[f"latents/{FATAL}.safetensors"]
    assert {path: found[path] for path in expected} == expected
    assert {path: os.stat(output / path).st_mtime_ns for path in first} == first, "encoded again"
    assert not list(output.rglob("*.part*"))
    said = capsys.readouterr()
    assert f"{CLIPS + 4 - len(first)} encoded, {len(first)} there already, 2 failed" in said.out
    assert said.err.count("goes to a group") == said.err.count("starving.mp4 goes to a group of 2 devices") == 1
    assert (output / "killed").exists()
    _check_what_it_says(output, len(first))
    _check_numbers(output, model, clips)
    assert main([*words, "--dry-run"]) == 0
    planned = capsys.readouterr().out
    assert f"{CLIPS + 4} finished, 1 to encode, 1 to set aside" in planned
    assert "64x96x5: 1 item, on 1 device" in planned
    assert re.search(r"0.0 MiB to write, about 0:00:\d\d of encoding", planned)
    assert main([*words, "--fail-fast"]) == 2
    assert "broken.mp4" in capsys.readouterr().err
    capsys.readouterr()
    with patch.object(DatasetRun, "survey", lambda *_, **__: signal.raise_signal(signal.SIGINT)):
        assert main(words) == 130
    assert capsys.readouterr().err == "halovae: interrupted; the same command goes on from there\n"
    assert callable(ray_worker.print_to_stdstream)  # What `datasets.cluster` silences.
    assert main([*words, "--fps", "5"]) == 2
    assert "was made in another way (fps None, now 5)" in capsys.readouterr().err


def _check_what_it_says(output: Path, there: int) -> None:
    counts = json.loads(Path("run.json").read_text())["counts"]
    told = [counts[name] for name in ("items", "encoded", "there", "failed")]
    assert told == [CLIPS + 6, CLIPS + 4 - there, there, 2]
    assert {"128x192x5": 2, "192x288x5": 2}.items() <= counts["groups"].items()
    assert set(counts["groups"].values()) == {1, 2}
    assert json.loads((output / "manifest.json").read_text())["counts"] == counts
    faults = [json.loads(line) for line in (output / "failed.jsonl").read_text().splitlines()]
    why = {fault["key"]: fault["why"] for fault in faults}
    assert why.keys() == {"broken.mp4", FATAL}
    assert "can't be read as an image or a video" in why["broken.mp4"]
    assert why[FATAL] == "it has ended 2 processes that were at it"
    assert not (output / ".begun").exists()
    page = Path("report/index.html").read_text()
    assert "broken.mp4" in page
    assert "Brought to 64x96x5, encoded, and decoded again: PSNR" in page


def _check_numbers(output: Path, model: str, clips: Path) -> None:
    """Each clip is encoded as by the VAE itself."""
    found = Latents(output)
    assert len(found) == CLIPS + 4
    vae = models.load(models.find(model), dtype=torch.float64, device=torch.device("cpu"))
    limits = vae_limits.limits_of(vae)
    items = {item.key: item for item in find_items(str(clips))}
    for sample in found:
        bucket = Bucket(*LARGER.get(sample["key"], (64, 96)), 5 if sample["key"].endswith("mp4") else 1)
        clip = codec.to_tensor(take(items[sample["key"]], bucket, None).pixels, torch.float64, torch.device("cpu"))
        with torch.inference_mode():
            expected = codec.encode(vae, limits, clip)[0]
        assert torch.allclose(sample["latents"], expected, rtol=0, atol=1e-12 * float(expected.abs().max()))
    assert found[found.keys["0.png"]]["caption"] == "columns"
    assert found[found.keys["sub/0.mp4"]]["done"]["source_frames"] == [0, 1, 2, 3, 4]
    assert main(["decode", str(output / "latents" / "sub" / "0.mp4.safetensors"), "-o", "0.mp4"]) == 0


@contextmanager
def sabotage() -> Iterator[None]:
    """Within it, workers get the steps of a dataset as this process has them."""
    modules = workers, groups, sys.modules[__name__]
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    try:
        with patch.object(workers, "take", _take), patch.object(workers.Device, "_encode", _encode):
            yield
    finally:
        for module in modules:
            cloudpickle.unregister_pickle_by_value(module)


def _take(item: Item, *given: Any) -> Any:
    if item.key == FATAL:
        os.kill(os.getpid(), signal.SIGKILL)
    return take(item, *given)


def _encode(device: workers.Device, clips: list[Tensor], encode: Any = workers.Device._encode) -> dict[str, Any]:
    """One device is killed. For the clip of 128 rows there is hardly more memory than is used, unless in a group."""
    with suppress(FileExistsError):
        (device._marks.parent / "killed").touch(exist_ok=False)
        os.kill(os.getpid(), signal.SIGKILL)
    if clips[0].shape[2] != 128 or "WORLD_SIZE" in os.environ:
        return encode(device, clips)
    lines = Path("/proc/self/status").read_text().splitlines()
    used = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:"))
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (used + 2**20, limits[1]))
    try:
        return encode(device, clips)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)


class TestWithoutRay:
    """Steps in this process."""

    @pytest.mark.parametrize("format_", ["webdataset", "parquet"])
    def test_packed(self, format_: str, model: str, clips: Path) -> None:
        layout = layout_of(model, format=format_, store="parameters", dtype="bfloat16")
        Path("o").mkdir()
        write_json(Path("o/manifest.json"), {**vars(layout), "scaling": layout.scaling})
        bucket, items = Bucket(64, 96, 5), find_items(str(clips / "sub"))[:3]
        for number, item in enumerate(items):
            taken = {"fps": "25", "times": [], "done": {"bucket": [5, 64, 96]}}
            layout.write(item, bucket, taken, torch.full((1, 32, 2, 8, 12), float(number)))
        pairs = [(item, bucket) for item in items]
        pack(layout, 0, pairs[:2])
        pack(layout, 0, pairs)  # What came later is added.
        assert keys_in(layout.shard(0)) == [item.key for item in items]
        found = Latents("o", scaled=True)
        assert [sample["key"] for sample in found] == [item.key for item in items]
        assert found[2]["latents"].shape == (16, 2, 8, 12)
        assert found[2]["latents"].dtype == torch.bfloat16
        assert torch.equal(found[2]["parameters"], torch.full((32, 2, 8, 12), 2.0, dtype=torch.bfloat16))
        before = layout.shard(0).read_bytes()
        pack(layout, 0, pairs)
        assert layout.shard(0).read_bytes() == before

    def test_musubi(self, model: str, clips: Path) -> None:
        """Names and keys by which its trainer finds latents, and its numbers: scaled."""
        layout = layout_of(model, format="musubi")
        Path("o").mkdir()
        write_json(Path("o/manifest.json"), {**vars(layout), "scaling": layout.scaling})
        item, bucket, latents = find_items(str(clips / "sub"))[0], Bucket(64, 96, 5), torch.randn(1, 16, 2, 8, 12)
        layout.write(item, bucket, {"fps": "25", "times": [], "done": {}}, latents)
        from safetensors import safe_open

        with safe_open("o/0_00000-005_0096x0064_wan.safetensors", "pt") as file:
            assert list(file.keys()) == ["latents_2x8x12_float32"]
            assert file.metadata()["architecture"] == "wan"
            mean, std = (
                torch.tensor(layout.scaling[name])[:, None, None, None] for name in ("latents_mean", "latents_std")
            )
            assert torch.allclose(file.get_tensor("latents_2x8x12_float32"), (latents[0] - mean) / std)
        assert torch.allclose(Latents("o")[0]["latents"], latents[0], atol=1e-5)

    def test_full_disk(self, model: str, clips: Path) -> None:
        """Ends the run, and is no fault of the clip."""
        with disk(Path("o")):
            if not os.path.ismount("o"):
                pytest.skip("no disk can be mounted here")
            job = Job(layout=layout_of(model), device="cpu", dtype="float32", fps=None, threads=1)
            unit = Unit(bucket=Bucket(64, 96, 5), items=(find_items(str(clips))[0],), wanted=(True,))
            latents = np.zeros((1, 80 * 2**20), np.uint8)
            row = {
                "unit": pickle.dumps(unit), "latents": latents,
                "read": json.dumps({"told": [{"fps": "25", "times": [], "done": {}}], "why": [None]}),
                "made": json.dumps({"shape": [1, 16, 2, 8, 80 * 2**10], "dtype": "float32", "seconds": 1.0}),
            }  # fmt: skip
            told = json.loads(workers.write_unit(row, job)["told"])
            assert [result["what"] for result in told["results"]] == [workers.STOP]
            assert "no space left on device" in told["results"][0]["why"]
            assert not [path for path in Path("o").rglob("*") if path.is_file()]

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["--bucket", "64x96x6"], "AutoencoderKLWan would pad it to 64x96x9"),
            (["--bucket", "60x96x5"], "AutoencoderKLWan would pad it to 64x96x5"),
            (["--bucket-area", "64x96x5", "--bucket-step", "20"], "--bucket-step 20: AutoencoderKLWan would pad"),
            (["--bucket-area", "16x16x5"], "smaller than a square of --bucket-step 32"),
            (["--bucket", "big"], "give HEIGHTxWIDTHxFRAMES"),
            ([], "--bucket is missing"),
            (["--bucket", "64x96", "--format", "zip"], "--format zip: give safetensors, webdataset"),
            (["--bucket", "64x96", "--store", "all"], "--store all: give mode or parameters"),
            (["--bucket", "64x96", "--fps", "0"], "--fps 0: give a number above 0 to 1000"),
            (["--bucket", "64x96", "--device", "tpu"], "--device tpu: this machine has cpu"),
            (["--bucket", "64x96", "--devices", "99999"], "--devices 99999:"),
            (["--bucket", "64x96", "--model", "none"], "--model none"),
            (["--bucket", "64x96", "-o", "no/such"], "no does not exist"),
            (["--bucket", "64x96", "-o", "other"], "holds other files, such as file"),
        ],
    )
    def test_bad_input(
        self, words: list[str], said: str, model: str, clips: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        Path("other").mkdir()
        Path("other/file").write_text("kept")
        given = ["encode-dataset", str(clips), *([] if "-o" in words else ["-o", "o"]), "--model", model, *words]
        assert main(given) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
        assert not Path("o").exists()

    def test_empty_folder(self, model: str, capsys: pytest.CaptureFixture[str]) -> None:
        Path("empty").mkdir()
        assert main(["encode-dataset", "empty", "-o", "o", "--model", model, *BUCKETS]) == 2
        assert "empty holds no clips" in capsys.readouterr().err

    def test_rates_are_kept_as_fractions(self, model: str, clips: Path) -> None:
        layout = layout_of(model)
        item = find_items(str(clips / "sub"))[0]
        taken = {"fps": "24000/1001", "times": [], "done": {}}
        layout.write(item, Bucket(64, 96, 5), taken, torch.zeros(1, 16, 2, 8, 12))
        _, info = latents_file.load(layout.place(item, Bucket(64, 96, 5)))
        assert info.fps == Fraction(24000, 1001)


def test_the_store_of_clips_leaves_memory_free() -> None:
    """Ray refuses to start where it would not."""
    assert store_bytes(2, 2**20) == 2**27
    assert store_bytes(48, 2**26) <= 48 * 3 * 2**26
    assert store_bytes(48, 2**40) < psutil.virtual_memory().available / 2


def test_a_cluster_that_is_not_there(tmp_path: Path, clips: Path, model: str) -> None:
    """In a process of its own, since this one has a cluster."""
    words = ["encode-dataset", str(clips), "-o", "o", "--model", model, *BUCKETS, "--ray-address", "127.0.0.1:9"]
    code, _, said = run(*words)
    assert code == 2
    assert said == "halovae: error: --ray-address 127.0.0.1:9 can't be reached: [Errno 111] Connection refused\n"
