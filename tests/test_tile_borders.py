"""Where tiles begin and end in a picture: against what their sizes say, and for every family that has tiles."""

from __future__ import annotations

import pytest
import torch
from tiles import CUTS, strides

from halovae.base.errors import TilingError
from halovae.tiles.near_borders import near_borders, tile_supports

HALVES = [(name, half) for name, cut in CUTS.items() for half in ("encode", "decode") if getattr(cut, half)]


def supports(name: str, half: str, height: int = 0, width: int = 0) -> torch.Tensor:
    cut = CUTS[name]
    picture = cut.picture(half, height, width)
    return tile_supports(cut.build(), half, (picture,), cut.family.decode_kwargs(picture) if half == "decode" else {})


def test_tiles_of_64_with_strides_of_48() -> None:
    """In a picture of 96 x 144 pixels; each tile but the last ones begins to fade where the next one begins."""
    found = supports("wan21", "decode", 96, 144)
    assert found.shape == (6, 96, 144)
    rows, columns = found.any(2), found.any(1)
    # The first row of a fading tile has a share of nothing.
    assert [(int(r.nonzero().min()), int(r.nonzero().max()) + 1) for r in rows[::3]] == [(0, 64), (49, 96)]
    assert [(int(c.nonzero().min()), int(c.nonzero().max()) + 1) for c in columns[:3]] == [
        (0, 64),
        (49, 112),
        (97, 144),
    ]


@pytest.mark.parametrize(("name", "half"), HALVES)
def test_every_family(name: str, half: str) -> None:
    """Tiles cover the picture, each one shows somewhere, and there is a border."""
    found = supports(name, half)
    assert found.any(0).all()
    assert found.any(2).any(1).all()
    assert near_borders(found, 1).any()


def test_low_precision_sees_the_same() -> None:
    cut = CUTS["kl"]
    picture, vae = cut.picture("encode"), cut.build()
    exact = tile_supports(vae, "encode", (picture,), {})
    assert torch.equal(exact, tile_supports(vae.bfloat16(), "encode", (picture.bfloat16(),), {}))


def test_the_vae_is_as_before() -> None:
    vae = CUTS["wan21"].build()
    before = dict(vars(vae))
    tile_supports(vae, "decode", (CUTS["wan21"].picture("decode"),), {})
    assert {name: value for name, value in vars(vae).items() if name in before and not name.startswith("_")} == {
        name: value for name, value in before.items() if not name.startswith("_")
    }


def test_a_tiled_path_that_fails() -> None:
    cut = CUTS["hunyuan_image"]
    with pytest.raises(TilingError, match="can't be told apart"):
        tile_supports(cut.build(), "encode", (cut.picture("encode"),), {})


def test_near_one_border() -> None:
    tiles = torch.zeros(2, 20, 30, dtype=torch.bool)
    tiles[0, :, :15], tiles[1, :, 15:] = True, True
    near = near_borders(tiles, 3)
    assert near.all(0).nonzero().flatten().tolist() == [12, 13, 14, 15, 16, 17]
    assert torch.equal(near.any(0), near.all(0))


def test_one_tile_has_no_border() -> None:
    cut = CUTS["wan21"]
    vae = cut.build()
    vars(vae).update(strides(64, 48))
    assert not near_borders(tile_supports(vae, "decode", (cut.picture("decode", 64, 64),), {}), 8).any()
