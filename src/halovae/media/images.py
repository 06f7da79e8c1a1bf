"""Still images, and animations that are kept as images are, through Pillow."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from halovae.base.errors import InputError
from halovae.base.files import first_line
from halovae.media.opened_file import MAX_FRAME_PIXELS, OpenedFile, Shown, broken, check_pixels

_ANIMATED = ("GIF", "PNG", "WEBP", "AVIF", "TIFF")
"""Kinds whose pictures are frames. Those of the others are previews, layers, or views of one scene."""
_VIDEOS = ("FLI",)
"""Kinds that libav reads better."""
_LOSSLESS = ("BMP", "PNG", "PPM", "TGA", "TIFF")
_INSTANT = Fraction(1, 100)
"""Frames that claim no more seconds than this are shown for `_USUAL` by every browser."""
_USUAL = Fraction(1, 10)


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image | None]:
    """The still image in the file, or None when there is something else in it, as an animation is."""
    with _opened(path) as image:
        yield None if image is None or is_animated(image) else image


@contextmanager
def open_pictures(path: Path) -> Iterator[OpenedFile | None]:
    """The image, or the frames of the animation; None when there is something else in the file."""
    with _opened(path) as image:
        if image is None:
            yield None
            return
        notes, size = list[str](), (image.height, image.width)
        if image.has_transparency_data:
            notes.append("the alpha channel is left out")
        lossy = "" if image.format in _LOSSLESS else image.format or "an unknown format"
        if is_animated(image):
            pictures = _animation(path, image, notes)
            yield OpenedFile(size=size, pictures=pictures, tick=Fraction(1, 1000), lossy=lossy, notes=notes)
            return
        count = getattr(image, "n_frames", 1)
        if count > 1:
            notes.append(f"of the {count} pictures in it the first is taken")
        still = (_shown(upright_rgb(path, only)) for only in (image,))  # Decoded when it is asked for.
        yield OpenedFile(size=size, pictures=still, is_still=True, lossy=lossy, notes=notes)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image | None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(path)
            getattr(image, "n_frames", 1)  # Some kinds are read as a whole for it.
        except UnidentifiedImageError:
            image = None
        except Image.DecompressionBombError:
            raise InputError(f"{path} claims more than {MAX_FRAME_PIXELS} pixels: too large, or broken") from None
        except Exception as error:  # Pillow's decoders raise what they like on a broken header.
            raise InputError(f"can't read image {path}: {first_line(error)}") from error
    if image is None or image.format in _VIDEOS:
        yield None
        return
    with image:
        check_pixels(path, image.width, image.height)
        yield image


def is_animated(image: Image.Image) -> bool:
    """Whether an opened image has several frames."""
    return image.format in _ANIMATED and _first(image) + 1 < getattr(image, "n_frames", 1)


def _shown(picture: Image.Image, begins: Fraction | None = None, lasts: Fraction | None = None) -> Shown:
    return Shown(size=(picture.height, picture.width), make=lambda: picture, begins=begins, lasts=lasts)


def _first(image: Image.Image) -> int:
    """The first frame: what is before it is shown only by those who know no animations."""
    return int(bool(getattr(image, "default_image", False)))


def _animation(path: Path, image: Image.Image, notes: list[str]) -> Iterator[Shown]:
    begins, size, untimed = Fraction(0), image.size, False
    first, count = _first(image), getattr(image, "n_frames", 1)
    for number in range(first, count):
        try:
            image.seek(number)
            picture = _upright(path, image) if image.size == size else None
        except InputError:
            raise
        except Exception as error:  # As in `_opened`.
            raise InputError(broken(path, number - first, first_line(error))) from error
        if picture is None:
            raise InputError(
                f"{path} has pages of {size[0]}x{size[1]} and of {image.width}x{image.height}, which can't be frames "
                f"of one clip: use --frames 0:1 for the first, or save the one that you mean as a file of its own"
            )
        lasts = Fraction(image.info.get("duration") or 0) / 1000
        if lasts <= _INSTANT:
            lasts, untimed = _USUAL, True
        yield _shown(picture, begins, lasts)
        begins += lasts
    if untimed:
        notes.append(f"frames without a time of their own: {float(_USUAL):g} seconds each, as in browsers")


def upright_rgb(path: Path, image: Image.Image) -> Image.Image:
    """Decode: turned as its EXIF data says, 8 bits, without alpha.

    Raises:
        InputError: damaged data, or pixels whose range is unknown.
    """
    try:
        return _upright(path, image)
    except InputError:
        raise
    except Exception as error:  # As in `_opened`, on broken data.
        raise InputError(f"can't read image {path}: {first_line(error)}") from error


def _upright(path: Path, image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        # Pillow's own conversion clips 16-bit greys at 255.
        grey = (np.asarray(image, dtype=np.uint32) * 255 + 32767) // 65535
        image = Image.fromarray(grey.astype(np.uint8))
    if image.mode in ("I", "F"):
        raise InputError(f"{path}: pixels of mode {image.mode} have no known range: convert it to 8 or 16 bits")
    return image.convert("RGB")
