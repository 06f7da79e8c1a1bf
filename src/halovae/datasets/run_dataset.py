"""A dataset from its list to its latents: looked through, divided into units, encoded, counted."""

from __future__ import annotations

import json
import pickle
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import ray
import torch
from ray.data import ActorPoolStrategy

from halovae.app.launch import cores, threads
from halovae.app.run_options import dtype_on
from halovae.app.session import Stages, device_kind
from halovae.app.tables import counted
from halovae.base.errors import HalovaeError, InputError
from halovae.datasets import forecast, workers
from halovae.datasets.buckets import Bucket, ClipSize, choose, parse_areas, parse_buckets
from halovae.datasets.cluster import cluster, readers
from halovae.datasets.forecast import Need
from halovae.datasets.formats import BEGUN, PACKED, Storage, check_format, check_names
from halovae.datasets.groups import Encoder, release
from halovae.datasets.items import Item, digest, find_items
from halovae.datasets.manifest import Fault, Folder, fingerprint
from halovae.datasets.private_ray import silent
from halovae.datasets.progress import Done, progress
from halovae.datasets.shards import Shards
from halovae.datasets.units import Job, Unit, group_sizes, together, units_of
from halovae.media import codec, models, vae_limits
from halovae.media.latents_file import scaling_of

_GIB = 2**30
_AT_ONCE = 16
"""Clips that one task looks at, where there are not many more."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a user wants, as the flags say it."""

    source: str
    output: Path
    model: str | None
    bucket: Sequence[str]
    bucket_area: Sequence[str]
    bucket_step: int
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


class DatasetRun:
    """One run of `halovae encode-dataset`.

    Args:
        asked: by the user.

    Raises:
        InputError: something of it can't be; nothing was started or written.
    """

    def __init__(self, asked: Asked) -> None:
        self.asked, self.notes = asked, Stages(speaks=True)
        given, shapes = parse_buckets(asked.bucket), parse_areas(asked.bucket_area, asked.bucket_step)
        self.buckets = sorted({*given, *shapes})
        self.fps = None if asked.fps is None else Fraction(asked.fps).limit_denominator(100_000)
        self.items = find_items(asked.source)
        self.source = models.find(asked.model)
        check_format(asked.format, asked.store, self.source.class_name)
        _, vae = models.find_skeleton(asked.model)
        self.limits = vae_limits.limits_of(vae)
        self.limits.known_pixels()
        _check_buckets(self.limits, given, shapes, asked.bucket_step)
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
            threads=threads(devices) if self.kind == "cpu" else 1,
        )  # fmt: skip
        layout = self.job.layout
        settings = {
            "buckets": [str(bucket) for bucket in self.buckets], "fps": self.job.fps, "format": asked.format,
            "store": asked.store, "store_dtype": layout.dtype, "dtype": dtype, "device": self.kind,
        }  # fmt: skip
        if asked.format in PACKED:  # A shard holds so many items of a list, which is to stay the same.
            settings |= {"shard_size": asked.shard_size, "items": digest(self.items)}
        self.folder = Folder(layout, fingerprint(self.source, settings))
        self.folder.check()

    @contextmanager
    def started(self) -> Iterator[None]:
        """Within it, the workers can be used."""
        asked = self.asked
        largest = max(3 * bucket.pixels * together(bucket) for bucket in self.buckets)
        local = 0 if asked.ray_address else self.devices
        with silent(), cluster(asked.ray_address, local, local if self.kind not in ("", "cpu") else 0, largest):
            if asked.ray_address:
                there = {name: int(count) for name, count in ray.cluster_resources().items() if name in ("CPU", "GPU")}
                self.kind = self.kind or ("cuda" if there.get("GPU") else "cpu")
                most = there.get("CPU" if self.kind == "cpu" else "GPU", 0)
                if (asked.devices or 1) > most:
                    raise InputError(f"--devices {asked.devices or 1}: the cluster has {most} of {self.kind}")
                self._set(asked.devices or (1 if self.kind == "cpu" else most))
            yield

    def survey(self, begun: Path, *, keep: bool) -> tuple[list[tuple[Item, Bucket]], dict[str, Fault]]:
        """The bucket of each clip, and the clips that have none.

        Args:
            begun: the folder of `workers.begun`.
            keep: what is found, for the next run.
        """
        seen = self.folder.read_seen()
        marks = {item.key: f"{item.state} at {self.job.fps}" for item in self.items}
        unknown = [item for item in self.items if marks[item.key] not in seen]
        if unknown:
            rows = [{"item": pickle.dumps(item)} for item in unknown]
            # A process takes longer to start than to look at a few clips.
            blocks = min(1 + len(rows) // _AT_ONCE, 8 * readers(self.devices, 0))
            data: Any = ray.data.from_items(rows, override_num_blocks=blocks)
            looked = data.map(workers.look_at, fn_kwargs={"fps": self.job.fps, "marks": begun}, num_cpus=1)
            with self.notes.stage("looking", len(rows)) as advance:
                for row in looked.iter_rows():
                    advance()
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

    def needs(self, buckets: Sequence[Bucket], *, timed: bool = False) -> dict[Bucket, Need]:
        """What a clip of each bucket takes.

        Args:
            timed: seconds, too.
        """
        memory = None if self.asked.memory is None else self.asked.memory * _GIB
        words = self.job, buckets, self.devices, memory, timed
        if self.kind == "cpu" and not self.asked.ray_address:
            found = forecast.needs(*words)
        else:
            remote: Any = ray.remote(forecast.needs)
            share = {"num_cpus": 1} if self.kind == "cpu" else {"num_cpus": 0, "num_gpus": 1}
            found = ray.get(remote.options(**share).remote(*words))
        return dict(zip(buckets, found, strict=True))

    def encode(self) -> Done:
        """Encode what is not finished yet.

        Raises:
            InputError: a clip failed and that is to end the run, the disk is full, or nothing could be encoded.
        """
        started = time.perf_counter()
        with self.folder.held():
            self.clips, faults = clips, _ = self.survey(self.folder.root / BEGUN, keep=True)
            self._set_aside(faults)
            there = self.folder.finished(clips)
            done = Done(items=len(self.items), there=len(there & {item.key for item, _ in clips}), failed=len(faults))
            units = units_of(clips, there)
            packing: list[Any] = []
            pack: Any = ray.remote(workers.pack_shard).options(num_cpus=0.5)
            shards = Shards(
                self.job.layout, self.asked.shard_size, self.items, clips, there, self.folder.packed(),
                lambda *shard: packing.append(pack.remote(self.job, *shard)),
            )  # fmt: skip
            if units:
                busy = self._encode(units, done, shards)
                done.seconds = time.perf_counter() - started
                done.busy = busy / (done.seconds * self.devices)
            for why in filter(None, ray.get(packing)):
                raise InputError(why)
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

    def _encode(self, units: Sequence[Unit], done: Done, shards: Shards) -> float:
        """Returns the seconds that devices were busy."""
        waiting = self._by_size(units)
        paths = {item.key: item.path for item in self.items}
        busy = 0.0
        with progress(self.notes, units) as advance:
            while size := next((size for size, those in waiting.items() if those), None):
                those, waiting[size] = waiting[size], []
                for unit, told in self._through(those, size):
                    busy += told["seconds"] * size
                    results = {result["key"]: result for result in told["results"]}
                    self._give_on(unit, results, size, waiting)
                    for result in results.values():
                        if result["what"] == workers.STOP:
                            raise InputError(result["why"])
                    kinds = Counter(result["what"] for result in results.values())
                    done.encoded += kinds[workers.DONE] + kinds[workers.THERE]
                    done.failed += kinds[workers.FAILED]
                    done.frames += told["frames"]
                    if kinds[workers.DONE]:
                        done.groups[str(unit.bucket)] = max(size, done.groups.get(str(unit.bucket), 0))
                    self._set_aside(
                        {key: Fault(key=key, path=paths[key], why=result["why"])
                         for key, result in results.items() if result["what"] == workers.FAILED}
                    )  # fmt: skip
                    shards.note(key for key, result in results.items() if result["what"] != workers.MEMORY)
                    advance((kinds[workers.DONE] + kinds[workers.FAILED]) * unit.bucket.frames)
                if size > 1:
                    release()
        return busy

    def _by_size(self, units: Sequence[Unit]) -> dict[int, list[Unit]]:
        """Units by the number of devices that the plan finds for them."""
        needs = self.needs(list(dict.fromkeys(unit.bucket for unit in units)))
        found: dict[int, list[Unit]] = {size: [] for size in group_sizes(self.devices)}
        for unit in units:
            need = needs[unit.bucket]
            # What the plan finds too large for all devices may fit after all.
            ranks = need.ranks or self.devices
            fits = need.bytes + (len(unit.items) - 1) * need.more <= need.room
            found[ranks] += [unit] if ranks == 1 and fits else unit.singly()
        return found

    def _give_on(
        self, unit: Unit, results: Mapping[str, dict[str, Any]], size: int, waiting: Mapping[int, list[Unit]]
    ) -> None:  # fmt: skip
        """Clips that were too large wait for the next try: one by one, or on more devices. If there is none, they have
        failed."""
        short = [one for one in unit.singly() if results[one.keys[0]]["what"] == workers.MEMORY]
        larger = next((other for other in waiting if other > size), None)
        if len(unit.items) > 1:
            waiting[size].extend(short)
            return
        for one in short:
            result = results[one.keys[0]]
            if larger is None:
                result["what"] = workers.FAILED
            else:
                waiting[larger].append(one)
                self.notes.note(f"{one.keys[0]} goes to a group of {larger} devices: {result['why']}")

    def _through(self, units: Sequence[Unit], size: int) -> Iterator[tuple[Unit, dict[str, Any]]]:
        """Units and what became of them, in the order in which they are finished.

        Args:
            units: to encode.
            size: devices of the group that encodes each.
        """
        rows = [{"unit": pickle.dumps(unit)} for unit in units]
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
            yield pickle.loads(row["unit"]), json.loads(row["told"])

    def plan(self) -> str:
        """What a run would do, in lines of text. Nothing is kept."""
        with self.folder.marks() as begun:
            clips, faults = self.survey(begun, keep=False)
        there = self.folder.finished(clips)
        left = Counter(bucket for item, bucket in clips if item.key not in there)
        needs = self.needs(sorted(left), timed=True)
        lines = [
            f"{counted(len(self.items), 'item')}: {len(there)} finished, {left.total()} to encode, "
            f"{len(faults)} to set aside; {counted(self.devices, 'device')} of {self.kind}, {self.job.dtype}"
        ]
        lines += forecast.plan(needs, left, self.devices, self.limits, self.job.layout)
        lines += [f"set aside: {fault.words}" for fault in list(faults.values())[:10]]
        return "\n".join(lines)


def _check_buckets(limits: vae_limits.Limits, given: Sequence[Bucket], shapes: Sequence[Bucket], step: int) -> None:
    """
    Raises:
        InputError: the VAE pads one of them.
    """
    for bucket in (*given, *shapes):
        try:
            fit = limits.fit(bucket.frames, bucket.height, bucket.width)
        except InputError as error:
            raise InputError(f"--bucket {bucket}: {error}") from None
        near = Bucket(fit.padded_height, fit.padded_width, fit.padded_frames)
        if near.frames != bucket.frames or (near != bucket and bucket in given):
            raise InputError(f"--bucket {bucket}: {limits.name} would pad it to {near}: give that, or a smaller one")
        if near != bucket:
            raise InputError(f"--bucket-step {step}: {limits.name} would pad {bucket} to {near}: give another step")


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
