"""`--mode`, the sizes of tiles, and the names that other projects have for them."""

from __future__ import annotations

import html
import json
from pathlib import Path

import pytest
import torch
from clips import CLIP
from command import enter, on_ranks, saved
from diffusers import AutoencoderKLMiniMaxH3
from families import FAMILIES
from pictures import error
from ranks import Ranks

from halovae.app.run_options import RunOptions
from halovae.base.errors import InputError
from halovae.cli.main import main
from halovae.media import FrameRange, codec, read
from halovae.media.latents_file import load
from halovae.tiles.tile_settings import TileSettings

RUN = ["roundtrip", str(CLIP), "-o", "o.mp4", "--frames", "0:5", "--height", "48"]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved("wan21", tmp_path_factory.mktemp("models") / "wan")


@pytest.fixture(scope="session")
def without_tiles(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved("vq", tmp_path_factory.mktemp("models") / "vq")


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return enter(tmp_path, monkeypatch)


REFUSED = {
    "word": (["--mode", "tiles"], "--mode tiles: give exact, tile or auto"),
    "size in exact mode": (["--tile-size", "64,64"], "--tile-size 64,64: exact mode has no tiles; add --mode tile"),
    "overlap in exact mode": (["--mode", "exact", "--tile-overlap", "16,16"], "--tile-overlap 16,16: exact mode has"),
    "one size": (["--mode", "tile", "--tile-size", "64"], "--tile-size 64: give height and width"),
    "no size": (["--mode", "tile", "--tile-size", "0,64"], "--tile-size 0,64: give height and width"),
    "axis of tiles": (["--mode", "tile", "--axis", "height"], "--axis height: tiles are not cut"),
    "tiles without tiles": (["--mode", "tile", "--untiled"], "--untiled is for exact mode, but --mode tile"),
    "two modes": (["--vae-use-tiling", "--mode", "auto"], "--vae-use-tiling means --mode tile, but --mode auto"),
    "patches": (["--vae-patch-parallel-size", "0"], "--vae-patch-parallel-size 0: give a whole number"),
    "more patches than ranks": (["--ranks", "2", "--vae-patch-parallel-size", "3"], "there are only 2 ranks"),
    "odd sizes": (
        ["--mode", "tile", "--tile-size", "60,60"],
        "tiles of 60 pixels that overlap by 16: AutoencoderKLWan",
    ),
    "large overlap": (["--mode", "tile", "--tile-overlap", "256,256"], "tiles of 256 pixels can't overlap by 256"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str, tiny: str, in_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments, message = REFUSED[name]
    assert main([*RUN, "--model", tiny, *arguments]) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("halovae: error: ")
    assert message in last
    assert not list(in_folder.iterdir())


def test_a_vae_without_tiles(without_tiles: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RUN, "--model", without_tiles, "--mode", "tile", "--tile-size", "64,64"]) == 2
    assert "the tiles of VQModel can't be set" in capsys.readouterr().err


def test_a_size_alone_keeps_the_share_of_the_overlap() -> None:
    vae = FAMILIES["wan21"].build()
    RunOptions(mode="tile", tile_size=(64, 128)).set_tiles(vae)
    tiles = TileSettings.of(vae)
    assert tiles is not None
    assert (tiles.size, tiles.overlap) == ((64, 128), (16, 32))


def test_one_setting_for_both_axes() -> None:
    with pytest.raises(InputError, match="one setting for both axes"):
        RunOptions(mode="tile", tile_size=(64, 128)).set_tiles(FAMILIES["kl"].build())


def test_the_names_of_others_mean_tiles() -> None:
    assert RunOptions(vae_use_tiling=True).mode == "tile"


TILES = ["--tile-size", "32,32", "--tile-overlap", "8,8"]


def test_tiles_on_two_ranks_and_their_seams(tiny: str, two_ranks: Ranks) -> None:
    """Under the names of vLLM-Omni; ranks that hold no picture end well."""
    names, narrow = ["--vae_use_tiling", "--vae_patch_parallel_size", "2"], ["--width", "56"]
    code, output, errors = on_ranks(
        two_ranks, *RUN, *narrow, "--model", tiny, "--json", "o.json", "--report", "r", *names, *TILES, "--compare"
    )
    assert code == 0, errors
    assert "note: --vae-use-tiling: this is --mode tile" in errors
    assert "tiles of 32 x 32 that overlap by 8 x 8" in output
    assert "tiles on 2 ranks against the VAE's own tiles on one rank: same bits" in output
    assert "✓ Passed" in (page := Path("r/index.html").read_text())
    assert "Tiles on 2 ranks against the VAE's own tiles on one rank: same bits." in html.unescape(page)
    assert "2 ranks in tiles against one rank" in page
    document = json.loads(Path("o.json").read_text())
    assert document["ranks"] == 2
    assert [half["decode"]["mode"] for half in document["per_rank"]] == ["tile"] * 2
    assert document["per_rank"][0]["decode"]["tiles"] > 2
    assert document["same_bits"] is True
    ways = {name: way["to_untiled"] for name, way in document["ways"].items()}
    assert ways["tile"] == ways["own_tiles"]
    assert ways["tile"]["largest"] > 100 * ways["exact"]["largest"]
    assert ways["untiled"]["largest"] == 0
    several = read(Path("o.mp4")).frames
    assert main([*RUN, *narrow, "--model", tiny, "--mode", "tile", *TILES]) == 0
    assert (read(Path("o.mp4")).frames == several).all()


def test_auto_says_what_it_chose(tiny: str, two_ranks: Ranks) -> None:
    code, output, errors = on_ranks(two_ranks, *RUN, "--model", tiny, "--mode", "auto")
    assert code == 0, errors
    assert "\nauto: exact: it gives the un-tiled result" in output


def test_a_number_format_for_each_half(tiny: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*RUN, "--model", tiny, "--vae-decode-dtype", "bfloat16", "--compare", "--json", "o.json"]) == 0
    assert "encode float32, decode bfloat16, 1 rank" in capfd.readouterr().out
    assert json.loads(Path("o.json").read_text())["dtype"] == "encode float32, decode bfloat16"


def test_a_vae_that_comes_tiled_is_what_diffusers_makes_of_the_clip(
    tmp_path_factory: pytest.TempPathFactory, two_ranks: Ranks
) -> None:
    """In its tiles and clips of 17 n + 5 frames, with its own numbers for pixels; nothing is dropped on the way."""
    model = saved("minimax_h3", tmp_path_factory.mktemp("models") / "h3")
    cut = ["--frames", "0:19", "--height", "60", "--width", "70", "--model", model]
    tiles = ["--mode", "tile", "--tile-size", "64,64", "--tile-overlap", "16,16"]
    assert on_ranks(two_ranks, "encode", str(CLIP), "-o", "o.safetensors", *cut, *tiles)[0] == 0
    assert on_ranks(two_ranks, "decode", "o.safetensors", "-o", "decoded.mp4", *tiles, "--lossless")[0] == 0

    source = codec.to_tensor(
        read(CLIP, frames=FrameRange.parse("0:19"), height=60, width=70).frames, torch.float32, torch.device("cpu")
    )
    source = torch.cat([source, source[:, -1:].expand(-1, 3, -1, -1)], dim=1)
    source = torch.nn.functional.pad(source[None], (0, 10, 0, 4, 0, 0), mode="replicate")
    mean, std = (torch.tensor(v).view(3, 1, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    vae = AutoencoderKLMiniMaxH3.from_pretrained(model)
    vae.enable_tiling(64, 64, 16, 16)
    with torch.no_grad():
        latents = vae.encode(((source + 1) / 2 - mean) / std).latent_dist.mode()
        pixels = (vae.decode(latents).sample[0] * std + mean).clamp(0, 1)[:, :19, :60, :70] * 255
    stored = load(Path("o.safetensors"))[0]
    assert stored.shape == latents.shape
    assert error(stored, latents) < 1e-5
    found = torch.from_numpy(read(Path("decoded.mp4")).frames).permute(3, 0, 1, 2)
    assert found.shape == pixels.shape
    assert (found - pixels).abs().max() < 0.51
