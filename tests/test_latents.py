"""Latents files: what `save` writes `load` reads, and nothing else."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from halovae.base.errors import InputError
from halovae.media import latents_file
from halovae.media.latents_file import LatentsInfo

INFO = LatentsInfo(
    model="demo",
    model_class="AutoencoderKLWan",
    scaling={"latents_mean": [0.5, -0.25], "latents_std": [1.0, 2.0]},
    fps=Fraction(30000, 1001),
    frames=6,
    height=51,
    width=67,
    padded_frames=9,
    padded_height=56,
    padded_width=72,
)


def save(path: Path, latents: torch.Tensor, info: LatentsInfo) -> None:
    with latents_file.LatentsWriter(path) as writer:
        writer.put(latents)
        writer.finish(info)


def write(path: Path, tensors: dict[str, torch.Tensor] | None = None, **changed: str | None) -> Path:
    """A file as `save` makes it, but for `tensors` and for metadata (None: left out)."""
    metadata = {**INFO.to_metadata(), **changed}
    given = {"latents": torch.ones(1, 2, 3, 7, 9)} if tensors is None else tensors
    save_file(given, path, metadata={key: value for key, value in metadata.items() if value is not None})
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 2, 3, 7, 9), (6, 2, 7, 9)])
def test_what_is_saved_is_loaded(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    values = torch.randn(shape).to(dtype)
    save(tmp_path / "o.safetensors", values, INFO)
    loaded, info = latents_file.load(tmp_path / "o.safetensors")
    assert info == INFO
    assert loaded.dtype == dtype
    assert torch.equal(loaded, values)
    assert [path.name for path in tmp_path.iterdir()] == ["o.safetensors"]
    # As any other new file, whatever the umask is.
    (tmp_path / "other").touch()
    assert (tmp_path / "o.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_what_comes_in_parts_is_what_comes_whole(tmp_path: Path) -> None:
    for dim, whole in ((2, torch.randn(1, 2, 5, 7, 9).bfloat16()), (0, torch.randn(6, 2, 7, 9))):
        save(tmp_path / "whole.safetensors", whole, INFO)
        with latents_file.LatentsWriter(tmp_path / "o.safetensors", dim) as writer:
            for part in whole.split([1, 3, whole.shape[dim] - 4], dim):
                writer.put(part)
            assert writer.shape == whole.shape
            writer.finish(INFO)
        content = (tmp_path / "o.safetensors").read_bytes()
        assert content == (tmp_path / "whole.safetensors").read_bytes()
        assert content == latents_file.content_of({"latents": whole}, INFO.to_metadata())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a disk that is always full")
def test_full_disk(tmp_path: Path) -> None:
    (tmp_path / f".o.{os.getpid()}.part.safetensors").symlink_to("/dev/full")
    with pytest.raises(InputError, match="no space left"):
        save(tmp_path / "o.safetensors", torch.ones(1, 2, 3, 7, 9), INFO)
    assert not list(tmp_path.iterdir())


def test_times_are_kept(tmp_path: Path) -> None:
    uneven = replace(INFO, times=(0, 3600, 7200, 45000, 48600, 90000, 270000))
    save(tmp_path / "o.safetensors", torch.ones(1, 2, 3, 7, 9), uneven)
    assert latents_file.load(tmp_path / "o.safetensors")[1] == uneven
    bad = ("[0, 1]", "[0, 2, 1, 3, 4, 5, 6]", "[1, 2, 3, 4, 5, 6, 7]", f"[0, 1, 2, 3, 4, 5, {2**40}]")
    for times in (*bad, '["0"]', "{}", "[0.5]", "?"):
        with pytest.raises(InputError, match="metadata"):
            latents_file.load(write(tmp_path / "bad.safetensors", times=times))


def test_scaling_is_what_the_config_says() -> None:
    wan = {"latents_mean": [1.0], "latents_std": [2.0], "z_dim": 16}
    assert latents_file.scaling_of(wan) == {"latents_mean": [1.0], "latents_std": [2.0]}
    assert latents_file.scaling_of({"scaling_factor": 0.18, "shift_factor": None}) == {"scaling_factor": 0.18}


NAN = torch.ones(1, 2, 3, 7, 9)
NAN[0, 1, 0, 0, 0] = float("nan")

BAD = {
    "format": ({"format": "other"}, "metadata format is 'other'"),
    "no format": ({"format": None}, "metadata format is None"),
    "no model": ({"model": None}, "metadata lacks model"),
    "several missing": ({"fps": None, "frames": None}, "metadata lacks fps, frames"),
    "frames": ({"frames": "many"}, "metadata can't be read"),
    "no frames": ({"frames": "0"}, "frames=0"),
    "frames beyond the padding": ({"frames": "10"}, "frames=10, padded to 9"),
    "width beyond the padding": ({"padded_width": "60"}, "width=67, padded to 60"),
    "rate": ({"fps": "0"}, "fps=0"),
    "rate of nothing": ({"fps": "1/0"}, "metadata can't be read"),
    "scaling": ({"scaling": "[1]"}, "not a JSON object"),
    "scaling cut off": ({"scaling": "{"}, "metadata can't be read"),
    "no tensor": ({"tensors": {}}, r"holds the tensors \(none\)"),
    "other tensor": ({"tensors": {"z": torch.ones(1)}}, "holds the tensors z"),
    "more tensors": ({"tensors": {"latents": torch.ones(1), "z": torch.ones(1)}}, "holds the tensors latents, z"),
    "too few dimensions": ({"tensors": {"latents": torch.ones(2, 3)}}, r"shape \(2, 3\)"),
    "too many dimensions": ({"tensors": {"latents": torch.ones(1, 1, 1, 1, 1, 1)}}, "need 4 or 5"),
    "nothing in it": ({"tensors": {"latents": torch.ones(1, 0, 2, 2)}}, "none empty"),
    "integers": ({"tensors": {"latents": torch.ones(1, 2, 2, 2, dtype=torch.int32)}}, "int32"),
    "NaN": ({"tensors": {"latents": NAN}}, "1 of 378 latents are NaN"),
    "infinite": ({"tensors": {"latents": NAN.nan_to_num(torch.inf) * torch.inf}}, "378 of 378 latents"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_one_line(tmp_path: Path, name: str) -> None:
    changed, message = BAD[name]
    path = write(tmp_path / "o.safetensors", **changed)
    with pytest.raises(InputError, match=message) as caught:
        latents_file.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [b"{}", b"hello, this is text", b"\xff" * 64, pickle.dumps({"latents": [1.0]}), b"\x08\0\0\0\0\0\0\0{}      "],
)
def test_other_kinds_of_files_are_one_line(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "o.safetensors").write_bytes(data)
    with pytest.raises(InputError) as caught:
        latents_file.load(tmp_path / "o.safetensors")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kept", [0, 4, 100, 800])
def test_truncated_files_are_one_line(tmp_path: Path, kept: int) -> None:
    path = write(tmp_path / "o.safetensors")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InputError, match=r"damaged|is empty"):
        latents_file.load(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        latents_file.load(tmp_path / "o.safetensors")


def test_broken_latents_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="NaN"):
        save(tmp_path / "o.safetensors", NAN, INFO)
    assert not list(tmp_path.iterdir())


def test_sizes_are_checked_when_made() -> None:
    with pytest.raises(InputError, match="height=51, padded to 50"):
        replace(INFO, padded_height=50)
