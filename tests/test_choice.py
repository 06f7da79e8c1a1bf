"""`mode="auto"`: exact, tiles where exact mode refuses or the VAE comes tiled, and it says why, alike on every rank."""

from __future__ import annotations

from typing import Any

import torch
from families import FAMILIES, run_decode
from pictures import raises
from ranks import Ranks
from tiles import CUTS, run_alone

import halovae
from halovae.base.errors import NotExactError


def turned_twice(module: Any, args: Any) -> Any:
    """What exact mode refuses in the midst of a call."""
    return (args[0].flip((-2, -1)).flip((-2, -1)), *args[1:])


def chosen(rank: int) -> list[tuple[str, str]]:
    """Of several VAEs and options, mode and reason; the results are those of the mode."""
    told: list[tuple[str, str]] = []
    for name, hook in (("wan21", None), ("wan21", turned_twice), ("allegro_tiled", None)):
        cut, family = CUTS[name], FAMILIES[name]
        vae, latent = cut.build(), cut.picture("decode")
        if hook:
            vae.decoder.mid_block.register_forward_pre_hook(hook)
        with halovae.parallelize(vae, mode="auto", verify=False) as handle:
            found = [run_decode(family, vae, latent) for _ in range(2)]
            report: Any = handle.last
        told.append((report.mode, report.choice))
        assert report.reference == ("tiles" if report.mode == "tile" else "un-tiled")
        assert torch.equal(*found)
        if report.mode == "tile":
            assert torch.equal(found[0], run_alone(cut, vae, "decode", latent))
        else:
            vae.use_tiling = False
            assert torch.allclose(found[0], run_decode(family, vae, latent), atol=1e-4)
    with (
        halovae.parallelize(vae, mode="auto", gather="shard", verify=False),
        raises(NotExactError, "without spatial tiles"),
    ):
        run_decode(family, vae, latent)
    return told


def test_exact_and_tiles_where_that_is_refused(two_ranks: Ranks) -> None:
    for wan, hooked, allegro in two_ranks.run(chosen):
        assert wan == ("exact", "exact: it gives the un-tiled result")
        assert hooked[0] == "tile"
        assert hooked[1].startswith(
            "tile: exact was refused (NotExactError: exact mode can't run torch.Tensor.flip in "
        )
        assert "mode='tile'" not in hooked[1]
        assert allegro == ("tile", "tile: the VAE runs in tiles only")
