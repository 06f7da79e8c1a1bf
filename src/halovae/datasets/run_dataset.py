"""A dataset from its list to its latents: looked through, divided into units, encoded, counted."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from fractions import Fraction
from pathlib import Path
from typing import Any

import ray
import torch
from ray.data import ActorPoolStrategy
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from halovae.app.launch import cores
from halovae.app.run_options import dtype_on
from halovae.app.session import Stages, device_kind
from halovae.app.tables import counted
from halovae.base.errors import HalovaeError, InputError
from halovae.datasets import workers
from halovae.datasets.buckets import Bucket, ClipSize, choose, parse_buckets
from halovae.datasets.cluster import cluster, readers
from halovae.datasets.formats import PACKED, PARTS, Storage, check_format, check_names
from halovae.datasets.groups import Encoder
from halovae.datasets.items import Item, find_items
from halovae.datasets.manifest import FAILED, Fault, Folder, fingerprint
from halovae.datasets.units import Job, Unit, group_sizes, together, units_of
from halovae.media import codec, models, vae_limits
from halovae.media.latents_file import scaling_of

_GIB = 2**30
_SAY_EVERY = 60.0
"""Seconds between two lines on the progress, where there is no terminal."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a user wants, as the flags say it."""

    source: str
    output: Path
    model: str | None
    bucket: Sequence[str]
    fps: float | None
    format: str
    store: str
    store_dtype: str | None
    shard_size: int
    dtype: str | None
    device: str | None
    devices: int | None
    ray_address: str | None
    memory: float | None
    """GiB of each device."""
    fail_fast: bool


@dataclass(kw_only=True)
class Done:
    """What a run did."""

    items: int
    """In the dataset."""
    encoded: int = 0
    there: int = 0
    """Finished by an earlier run."""
    failed: int = 0
    frames: int = 0
    seconds: float = 0.0
    busy: float = 0.0
    """Share of the time that devices encoded."""
    groups: dict[str, int] = field(default_factory=dict[str, int])
    """Devices that clips of a bucket were encoded on."""

    @property
    def rate(self) -> float:
        """Frames per second."""
        return self.frames / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "frames_per_second": self.rate}


class DatasetRun:
    """One run of `halovae encode-dataset`.

    Args:
        asked: by the user.

    Raises:
        InputError: something of it can't be; nothing was started or written.
    """

    def __init__(self, asked: Asked) -> None:
        self.asked, self.notes = asked, Stages(speaks=True)
        self.buckets = parse_buckets(asked.bucket)
        self.fps = None if asked.fps is None else Fraction(asked.fps).limit_denominator(100_000)
        if asked.fps is not None and not 0 < asked.fps <= 1000:
            raise InputError(f"--fps {asked.fps:g}: give more than 0, and 1000 at the most")
        self.items = find_items(asked.source)
        self.source = models.find(asked.model)
        check_format(asked.format, asked.store, self.source.class_name)
        _, vae = models.find_skeleton(asked.model)
        self.limits = vae_limits.limits_of(vae)
        self.limits.known_pixels()
        _check_buckets(self.limits, self.buckets)
        if asked.store == "parameters":
            _check_parameters(vae, self.limits, self.buckets[0])
        # A machine that only starts the work of a cluster may have no accelerator.
        self.kind = asked.device or ("" if asked.ray_address else device_kind(None))
        if asked.device and not asked.ray_address:
            device_kind(asked.device)
        self._scaling = scaling_of(vae.config)
        if not asked.ray_address:
            self._set(self._local_devices())

    def _local_devices(self) -> int:
        asked = self.asked.devices
        if self.kind == "cpu":
            devices = asked or 1
            if devices > 2 * cores():
                raise InputError(f"--devices {devices}: {2 * cores()} at most, 2 for each core of this machine")
            return devices
        there = torch.accelerator.device_count()
        if asked is not None and asked > there:
            raise InputError(f"--devices {asked}: this machine has {there} of {self.kind}")
        return asked or there

    def _set(self, devices: int) -> None:
        """What is known as soon as the devices are."""
        asked, self.devices = self.asked, devices
        dtype = dtype_on(self.kind, asked.dtype)
        self.job = Job(
            layout=Storage(
                folder=str(asked.output.absolute()), format=asked.format, store=asked.store,
                dtype=asked.store_dtype or dtype, model=self.source.model, model_class=self.source.class_name,
                scaling=self._scaling,
            ),
            device=self.kind, dtype=dtype, fps=None if self.fps is None else str(self.fps),
            threads=max(1, cores() // devices) if self.kind == "cpu" else 1,
        )  # fmt: skip
        layout = self.job.layout
        settings = {
            "buckets": [str(bucket) for bucket in self.buckets], "fps": self.job.fps, "format": asked.format,
            "store": asked.store, "store_dtype": layout.dtype, "dtype": dtype, "device": self.kind,
        }  # fmt: skip
        if asked.format in PACKED:  # A shard holds so many items of a list, which is to stay the same.
            settings |= {"shard_size": asked.shard_size, "items": _digest(self.items)}
        self.folder = Folder(layout, fingerprint(self.source, settings))
        self.folder.check()

    @contextmanager
    def started(self) -> Iterator[None]:
        """Within it, the workers can be used."""
        asked = self.asked
        largest = max(3 * bucket.pixels * together(bucket) for bucket in self.buckets)
        local = 0 if asked.ray_address else self.devices
        with cluster(asked.ray_address, local, local if self.kind not in ("", "cpu") else 0, largest):
            if asked.ray_address:
                there = {name: int(count) for name, count in ray.cluster_resources().items() if name in ("CPU", "GPU")}
                self.kind = self.kind or ("cuda" if there.get("GPU") else "cpu")
                most = there.get("CPU" if self.kind == "cpu" else "GPU", 0)
                if (asked.devices or 1) > most:
                    raise InputError(f"--devices {asked.devices or 1}: the cluster has {most} of {self.kind}")
                self._set(asked.devices or (1 if self.kind == "cpu" else most))
            yield

    def survey(self, *, keep: bool) -> tuple[list[tuple[Item, Bucket]], dict[str, Fault]]:
        """The bucket of each clip, and the clips that have none.

        Args:
            keep: what is found, for the next run.
        """
        seen = self.folder.read_seen()
        marks = {item.key: _mark(item, self.job.fps) for item in self.items}
        unknown = [item for item in self.items if marks[item.key] not in seen]
        if unknown:
            rows = [{"item": json.dumps(item.to_dict())} for item in unknown]
            blocks = min(len(rows), 8 * readers(self.devices, 0))
            data: Any = ray.data.from_items(rows, override_num_blocks=blocks)
            looked = data.map(workers.look_at, fn_kwargs={"fps": self.job.fps}, num_cpus=1)
            for row in self._shown(looked.iter_rows(), len(rows), "looking"):
                found = json.loads(row["seen"])
                mark = marks[found["key"]]
                seen[mark] = {"mark": mark, **found}
            if keep:
                self.folder.write_seen([seen[mark] for mark in marks.values() if "why" not in seen[mark]])
        clips: list[tuple[Item, Bucket]] = []
        faults: dict[str, Fault] = {}
        for item in self.items:
            found = seen[marks[item.key]]
            try:
                if "why" in found:
                    raise InputError(found["why"])
                sizes = ClipSize(height=found["height"], width=found["width"], frames=found["frames"])
                clips.append((item, choose(sizes, self.buckets)))
            except InputError as error:
                faults[item.key] = Fault(key=item.key, path=item.path, why=str(error))
        check_names(self.job.layout, clips)
        return clips, faults

    def _shown(self, rows: Any, count: int, name: str) -> Iterator[Any]:
        with self.notes.stage(name, count) as advance:
            for row in rows:
                advance()
                yield row

    def needs(self, buckets: Sequence[Bucket]) -> dict[Bucket, dict[str, Any]]:
        """How many devices each bucket takes."""
        memory = None if self.asked.memory is None else self.asked.memory * _GIB
        sizes = [(bucket.frames, bucket.height, bucket.width) for bucket in buckets]
        if self.kind == "cpu" and not self.asked.ray_address:
            found = workers.needs(self.job, sizes, self.devices, memory)
        else:
            remote: Any = ray.remote(workers.needs)
            share = {"num_cpus": 1} if self.kind == "cpu" else {"num_cpus": 0, "num_gpus": 1}
            found = ray.get(remote.options(**share).remote(self.job, sizes, self.devices, memory))
        return dict(zip(buckets, found, strict=True))

    def encode(self) -> Done:
        """Encode what is not finished yet.

        Raises:
            InputError: a clip failed and that is to end the run, the disk is full, or nothing could be encoded.
        """
        started = time.perf_counter()
        with self.folder.held():
            self.clips, faults = clips, _ = self.survey(keep=True)
            self._set_aside(faults)
            there = self.folder.finished(clips)
            done = Done(items=len(self.items), there=len(there & {item.key for item, _ in clips}), failed=len(faults))
            units = units_of(clips, there)
            shards = _Shards(self.job, self.asked.shard_size, self.items, clips, there, self.folder.packed())
            if units:
                busy = self._encode(units, done, shards)
                done.seconds = time.perf_counter() - started
                done.busy = busy / (done.seconds * self.devices)
            shards.finish()
            self.folder.tidy()
            self.folder.tell(done.to_dict())
        if not done.encoded and not done.there:
            reasons = Counter(fault.why for fault in self.folder.faults.values()).most_common(1)
            raise InputError(f"none of {counted(done.items, 'clip')} could be encoded: {reasons[0][0]}")
        return done

    def _set_aside(self, faults: Mapping[str, Fault]) -> None:
        if faults:
            self.folder.note_faults(faults)
            if self.asked.fail_fast:
                first = next(iter(faults.values()))
                raise InputError(first.words)

    def _encode(self, units: Sequence[Unit], done: Done, shards: _Shards) -> float:
        """Returns the seconds that devices were busy."""
        needs = self.needs(list(dict.fromkeys(unit.bucket for unit in units)))
        waiting: dict[int, list[Unit]] = {size: [] for size in group_sizes(self.devices)}
        for unit in units:
            need = needs[unit.bucket]
            # What the plan finds too large for all devices may fit after all.
            ranks = need["ranks"] or self.devices
            fits = need["bytes"] + (len(unit.items) - 1) * need["more"] <= need["room"]
            waiting[ranks] += [unit] if ranks == 1 and fits else unit.singly()
        paths = {item.key: item.path for item in self.items}
        busy = 0.0
        with _Progress(self.notes, units) as progress:
            while size := next((size for size, those in waiting.items() if those), None):
                those, waiting[size] = waiting[size], []
                larger = next((other for other in waiting if other > size), None)
                for unit, told in self._through(those, size):
                    busy += told["seconds"] * size
                    results = {result["key"]: result for result in told["results"]}
                    if short := [one for one in unit.singly() if results[one.keys[0]]["what"] == workers.MEMORY]:
                        if len(unit.items) > 1:
                            waiting[size] += short
                        elif larger is not None:
                            waiting[larger] += short
                            why = results[unit.keys[0]]["why"]
                            self.notes.note(f"{unit.keys[0]} goes to a group of {larger} devices: {why}")
                        else:
                            results[unit.keys[0]]["what"] = workers.FAILED
                    kinds = Counter(result["what"] for result in results.values())
                    done.encoded += kinds[workers.DONE] + kinds[workers.THERE]
                    done.failed += kinds[workers.FAILED]
                    done.frames += told["frames"]
                    if kinds[workers.DONE]:
                        done.groups[str(unit.bucket)] = max(size, done.groups.get(str(unit.bucket), 0))
                    for result in results.values():
                        if result["what"] == workers.STOP:
                            raise InputError(result["why"])
                    self._set_aside(
                        {key: Fault(key=key, path=paths[key], why=result["why"])
                         for key, result in results.items() if result["what"] == workers.FAILED}
                    )  # fmt: skip
                    shards.note(key for key, result in results.items() if result["what"] != workers.MEMORY)
                    progress.advance(unit, kinds[workers.DONE] + kinds[workers.FAILED], told["frames"])
        return busy

    def _through(self, units: Sequence[Unit], size: int) -> Iterator[tuple[Unit, dict[str, Any]]]:
        """Units and what became of them, in the order in which they are finished.

        Args:
            units: to encode.
            size: devices of the group that encodes each.
        """
        rows = [{"unit": unit.to_json()} for unit in units]
        groups = min(self.devices // size, len(rows))
        if self.kind == "cpu":
            share = {"num_cpus": 1 if size == 1 else 0}
        else:
            share = {"num_cpus": 0, "num_gpus": 1 if size == 1 else 0}
        pool = ActorPoolStrategy(
            size=groups, max_tasks_in_flight_per_actor=3, max_concurrent_calls_per_actor=2,
            enable_true_multi_threading=True,
        )  # fmt: skip
        data: Any = ray.data.from_items(rows, override_num_blocks=len(rows))
        # Not the share of a device: Ray would read in the processes of the devices, to have fewer.
        data = data.map(workers.read_unit, fn_kwargs={"job": self.job}, num_cpus=0.99)
        data = data.map(Encoder, fn_constructor_args=(self.job, size), compute=pool, **share)
        data = data.map(workers.write_unit, fn_kwargs={"job": self.job}, num_cpus=0.5)
        for row in data.iter_rows():
            yield Unit.from_json(row["unit"]), json.loads(row["told"])

    def plan(self) -> str:
        """What a run would do, in lines of text. Nothing is written."""
        clips, faults = self.survey(keep=False)
        there = self.folder.finished(clips)
        left = [bucket for item, bucket in clips if item.key not in there]
        needs = self.needs(sorted(set(left)))
        counts = Counter(left)
        lines = [
            f"{counted(len(self.items), 'item')}: {len(there)} finished, {len(left)} to encode, "
            f"{len(faults)} to set aside; {counted(self.devices, 'device')} of {self.kind}, {self.job.dtype}"
        ]
        total = 0
        for bucket, need in needs.items():
            size = counts[bucket] * _bytes(self.limits, bucket, self.job.layout)
            total += size
            ranks, room = need["ranks"], f"{need['bytes'] / _GIB:.2f} GiB"
            where = f"on 1 device, {room}" if ranks == 1 else f"on {ranks} devices as shards, {room} each"
            if ranks is None:
                where = f"on no number of devices: {room} of {need['room'] / _GIB:.2f} GiB"
            lines.append(f"{bucket}: {counted(counts[bucket], 'item')}, {where}, {size / 2**20:.1f} MiB of latents")
        lines.append(f"{total / 2**20:.1f} MiB to write")
        lines += [f"set aside: {fault.words}" for fault in list(faults.values())[:10]]
        return "\n".join(lines)


class _Shards:
    """Packs the shards of a packed format as soon as all their items are finished or have failed."""

    def __init__(
        self, job: Job, size: int, items: Sequence[Item], clips: Sequence[tuple[Item, Bucket]],
        there: set[str], packed: set[int],
    ) -> None:  # fmt: skip
        self._job, self._tasks = job, list[Any]()
        self._left: dict[int, set[str]] = {}
        self._clips: dict[int, list[tuple[Item, Bucket]]] = {}
        if job.layout.format not in PACKED:
            return
        self._number = {item.key: number // size for number, item in enumerate(items)}
        for item, bucket in clips:
            number = self._number[item.key]
            self._clips.setdefault(number, []).append((item, bucket))
            self._left.setdefault(number, set())
            if item.key not in there:
                self._left[number].add(item.key)
        parts = job.layout.root / PARTS
        for number, left in list(self._left.items()):
            if not left and (number not in packed or parts.exists()):
                self._pack(number)

    def note(self, keys: Any) -> None:
        """Items that nothing more will come of."""
        for key in keys if self._left else ():
            left = self._left[self._number[key]]
            left.discard(key)
            if not left:
                self._pack(self._number[key])

    def _pack(self, number: int) -> None:
        remote: Any = ray.remote(workers.pack_shard)
        self._tasks.append(remote.options(num_cpus=0.5).remote(self._job, number, self._clips[number]))

    def finish(self) -> None:
        """
        Raises:
            InputError: a shard can't be written.
        """
        for why in filter(None, ray.get(self._tasks)):
            raise InputError(why)


class _Progress:
    """Items, frames per second and the time that is left: a bar in a terminal, else a line now and then."""

    def __init__(self, notes: Stages, units: Sequence[Unit]) -> None:
        self._notes = notes
        self._items = sum(len(unit.keys) for unit in units)
        self._work = sum(unit.bucket.pixels * len(unit.keys) for unit in units)
        self._done, self._worked, self._frames = 0, 0, 0
        self._started = self._said = time.perf_counter()
        self._bar: Progress | None = None

    def __enter__(self) -> _Progress:
        if sys.stderr.isatty():
            columns = TextColumn("encode"), BarColumn(), TextColumn("{task.description}")
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self._words(), total=self._work)
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, unit: Unit, items: int, frames: int) -> None:
        self._done += items
        self._worked += items * unit.bucket.pixels
        self._frames += frames
        now = time.perf_counter()
        if self._bar is not None:
            self._bar.update(self._task, completed=self._worked, description=self._words())
        elif now - self._said > _SAY_EVERY:
            self._said = now
            self._notes.note(self._words())

    def _words(self) -> str:
        seconds = time.perf_counter() - self._started
        words = f"{self._done} of {counted(self._items, 'item')}"
        if self._worked:
            left = timedelta(seconds=round(seconds * (self._work - self._worked) / self._worked))
            words += f", {self._frames / seconds:.1f} frames/s, {left} left"
        return words


def _check_buckets(limits: vae_limits.Limits, buckets: Sequence[Bucket]) -> None:
    """
    Raises:
        InputError: the VAE pads one of them.
    """
    for bucket in buckets:
        try:
            fit = limits.fit(bucket.frames, bucket.height, bucket.width)
        except InputError as error:
            raise InputError(f"--bucket {bucket}: {error}") from None
        near = Bucket(fit.padded_height, fit.padded_width, fit.padded_frames)
        if near != bucket:
            raise InputError(f"--bucket {bucket}: {limits.name} would pad it to {near}: give that, or a smaller one")


def _check_parameters(vae: Any, limits: vae_limits.Limits, bucket: Bucket) -> None:
    """
    Raises:
        InputError: what the VAE encodes to is no distribution.
    """
    clip = torch.empty(3, bucket.frames, bucket.height, bucket.width, device="meta")
    with torch.no_grad():
        try:
            vae_limits.parameters_of(vae.encode(next(codec.encode_calls(limits, clip.split(1, dim=1), clip.shape[1]))))
        except HalovaeError as error:
            raise InputError(f"--store parameters: {error}") from None


def _bytes(limits: vae_limits.Limits, bucket: Bucket, layout: Storage) -> int:
    """Of the latents of one item."""
    frames = bucket.frames if limits.per_frame or not limits.period else 1 + (bucket.frames - 1) // limits.period
    numbers = limits.latent_channels * frames * (bucket.height // limits.ratio) * (bucket.width // limits.ratio)
    return numbers * getattr(torch, layout.dtype).itemsize * (2 if layout.store == "parameters" else 1)


def _mark(item: Item, fps: str | None) -> str:
    """Changes when a clip does."""
    try:
        stat = Path(item.path).stat()
        state = [stat.st_size, stat.st_mtime_ns]
    except OSError:
        state = []
    return json.dumps([item.path, item.member, item.frames, fps, *state])


def _digest(items: Sequence[Item]) -> str:
    import hashlib

    return hashlib.sha256("\n".join(item.key for item in items).encode()).hexdigest()[:32]


def summary(done: Done, asked: Asked) -> str:
    """What a user reads at the end."""
    lines = [
        f"{asked.output}: {counted(done.items, 'item')}: {done.encoded} encoded, {done.there} there already, "
        f"{done.failed} failed" + (f" (see {asked.output / FAILED})" if done.failed else "")
    ]
    if done.encoded:
        took = timedelta(seconds=round(done.seconds))
        lines.append(f"{took}, {done.rate:.1f} frames/s, devices busy {100 * done.busy:.0f} %")
    return "\n".join(lines)
