"""Where one tile ends and the next begins in a picture, found by the VAE's own putting together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from halovae.base.errors import TilingError
from halovae.base.trees import pictures_in
from halovae.calls.randomness import Generators
from halovae.calls.record import Recording, answering
from halovae.calls.target import Target
from halovae.tiles.blend import Blends
from halovae.tiles.check import Checker, shrunk
from halovae.tiles.schedule import find_chains
from halovae.tiles.tile_settings import applied

_MARK = 1000.0
"""What a tile is filled with: its faintest share in a blend is well above rounding."""


def tile_supports(vae: Any, half: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """For each tile, the positions of the result that it has a share in.

    The recorded calls are answered with one tile marked and the others empty, for one tile after the other; what is
    not empty after blending and cropping is where the marked tile shows.

    Args:
        vae: a VAE that is not parallelized.
        half: "encode" or "decode".
        args: its arguments; pictures count by their size.
        kwargs: likewise.

    Returns:
        (tiles, height, width), bool.

    Raises:
        TilingError: the VAE doesn't run in tiles on one frame, nor on all.
    """
    target, blends = Target(vae), Blends(vae)
    checker, failure = Checker(target, half, blends), None
    for frames in (1, None):
        small, small_kwargs = shrunk((args, kwargs), frames)
        try:
            with applied(vae, {"use_tiling": True}):
                recording = checker.recorded(small, small_kwargs)
                return _supports(target, half, blends, small, small_kwargs, recording)
        except Exception as error:  # Whatever a model's own tiled method raises.
            failure = error
    raise TilingError(f"the tiles of {target.name}.{half} can't be told apart: {failure}") from failure


def _supports(
    target: Target, half: str, blends: Blends, args: tuple[Any, ...], kwargs: dict[str, Any], recording: Recording
) -> Tensor:
    chains = find_chains(recording.calls)

    def with_mark(marked: frozenset[int]) -> Tensor:
        numbers = iter(range(len(recording.calls)))

        def network(picture: Tensor, *args: Any, **kwargs: Any) -> Any:
            number = next(numbers)
            call, value = recording.calls[number], _MARK if number in marked else 0.0
            filled = [torch.full(s.shape, value, dtype=s.dtype, device=picture.device) for s in call.specs]
            return call.result(filled, device=picture.device)

        generators = Generators(pictures_in((args, kwargs))[0].device, *args, *kwargs.values())
        with torch.no_grad(), answering(target.vae, half, network), blends.fast():
            result = target.originals[half](*args, **kwargs)
        generators.rewind()
        return pictures_in(result)[0]

    empty = with_mark(frozenset())
    return torch.stack([(with_mark(frozenset(chain.calls)) != empty).flatten(0, -3).any(0) for chain in chains]).cpu()


def near_borders(supports: Tensor, distance: int) -> Tensor:
    """(height, width), bool: the positions at most `distance` from a place where another tile begins or ends.

    Args:
        supports: of `tile_supports`.
        distance: in positions, along rows and columns; 1 is next to the border itself.
    """
    border = torch.zeros(supports.shape[-2:], dtype=torch.bool, device="cpu")
    down = (supports[:, 1:] != supports[:, :-1]).any(0)
    across = (supports[:, :, 1:] != supports[:, :, :-1]).any(0)
    border[1:] |= down
    border[:-1] |= down
    border[:, 1:] |= across
    border[:, :-1] |= across
    reach = distance - 1
    wide = functional.max_pool2d(border[None, None].float(), 2 * reach + 1, stride=1, padding=reach)
    return wide[0, 0] > 0
