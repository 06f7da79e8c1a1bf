"""Still images, through Pillow."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from halovae.errors import InputError
from halovae.files import first_line
from halovae.media.limits import MAX_FRAME_PIXELS, check_pixels


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image | None]:
    """The still image in the file, or None when there is something else in it (animations are videos here).

    Raises:
        InputError: an image, but a broken or a too large one.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            image = Image.open(path)
        except UnidentifiedImageError:
            image = None
        except Image.DecompressionBombError:
            raise InputError(f"{path} claims more than {MAX_FRAME_PIXELS} pixels: too large, or broken") from None
        except Exception as error:  # Pillow's decoders raise what they like on a broken header.
            raise InputError(f"can't read image {path}: {first_line(error)}") from error
    if image is None:
        yield None
        return
    with image:
        check_pixels(path, image.width, image.height)
        yield image if getattr(image, "n_frames", 1) == 1 else None


def upright_rgb(path: Path, image: Image.Image) -> Image.Image:
    """Decode: turned as its EXIF data says, 8 bits, without alpha.

    Raises:
        InputError: damaged data, or pixels whose range is unknown.
    """
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            # Pillow's own conversion clips 16-bit greys at 255.
            grey = (np.asarray(image, dtype=np.uint32) * 255 + 32767) // 65535
            image = Image.fromarray(grey.astype(np.uint8))
        if image.mode in ("I", "F"):
            raise InputError(f"{path}: pixels of mode {image.mode} have no known range: convert it to 8 or 16 bits")
        return image.convert("RGB")
    except InputError:
        raise
    except Exception as error:  # As above, on broken data.
        raise InputError(f"can't read image {path}: {first_line(error)}") from error


def image_notes(image: Image.Image) -> tuple[str, ...]:
    """What `upright_rgb` leaves out."""
    return ("the alpha channel is left out",) if image.has_transparency_data else ()
