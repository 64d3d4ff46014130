"""Image files: photographs as RGB, in full or at the scale that is needed, and masks that are stored as images."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from dual_loop.data.limits import RefusedFile, check_file, check_pixels, max_pixels
from dual_loop.errors import SampleError, bad_sample
from dual_loop.types import NeededSize

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

MOST_AT_ONCE = 1 << 26
"""Bytes of a JPEG that are read to be decoded at once; Pillow reads larger ones block by block."""

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "PPM", "TGA", "JPEG2000", "AVIF", "HEIF")
"""What is decoded, by Pillow's names, whatever a file is called: Pillow hands some others to outside programs."""

Image.MAX_IMAGE_PIXELS = 2**28  # the most that data.max_pixels may be; what is above the setting is refused here


@dataclass(frozen=True)
class Picture:
    """A decoded image that may be smaller than the stored one.

    Attributes:
        pixels: (ceil(H / reduction), ceil(W / reduction), 3) uint8 RGB.
        size: (H, W) of the stored image.
        reduction: 1, or 2, 4, 8 where a JPEG was decoded at a half, a quarter, an eighth of its sides.
        orientation: as the file's EXIF says, 1 to 8, whether it was applied or not; 1 is upright.
    """

    pixels: np.ndarray
    size: tuple[int, int]
    reduction: int = 1
    orientation: int = 1

    def resized(self, height: int, width: int) -> np.ndarray:
        """Return (height, width, 3) uint8: the stored image's whole area by Pillow's bicubic filter."""
        box = None
        if self.reduction > 1:  # the last pixel of an odd side is only partly covered
            box = (0, 0, self.size[1] / self.reduction, self.size[0] / self.reduction)
        return np.asarray(Image.fromarray(self.pixels).resize((width, height), Image.Resampling.BICUBIC, box))


def read_picture(
    source: str | Path | io.BytesIO, apply_exif: bool, where: str | None = None, needed: NeededSize | None = None
) -> Picture:
    """Read an image file as RGB.

    Grey, palette and CMYK images are converted, transparency is dropped, 16-bit grey keeps its upper 8 bits; of
    several frames the first is taken.

    Args:
        source, where: the file, or its contents; what names it in messages, None takes the path.
        apply_exif: turn the image as its EXIF orientation says.
        needed: from (H, W) to the size that is needed of such an image. A JPEG is then decoded at the smallest of
            1/1, 1/2, 1/4 and 1/8 that still has that size, unless ``apply_exif``: a turned image is decoded in full.

    Raises:
        SampleError: ``missing_file``, ``truncated_file`` (damaged or incomplete), ``not_an_image``, ``too_large``.
    """
    path = where or str(source)
    with decoding(source, path) as image:
        size = (image.height, image.width)
        reduction = 1
        if needed is not None and not apply_exif and isinstance(image, JpegImageFile):
            height, width = needed(*size)
            # The decoder leaves out the high frequencies of each 8 x 8 block (libjpeg, "scale_num / scale_denom").
            if min(size[0] // height, size[1] // width) >= 2 and (drafted := image.draft(None, (width, height))):
                reduction = round(size[1] / drafted[1][2])
        turn = image.getexif().get(0x0112, 1)
        pixels = None if reduction > 1 or (apply_exif and turn != 1) else _decode_fast(image)
        if pixels is None:
            image.load()
            if apply_exif:
                image = ImageOps.exif_transpose(image)
                size = (image.height, image.width)
            pixels = to_rgb(image, path)
    return Picture(pixels, size, reduction, turn if turn in range(1, 9) else 1)


def _decode_fast(image: Image.Image) -> np.ndarray | None:
    """Return what Pillow makes of a JPEG at full scale, by simplejpeg, a fifth sooner.

    None where that is not installed, for other images, and where libjpeg warns: Pillow says whether the file is good.
    """
    if simplejpeg is None or not isinstance(image, JpegImageFile) or image.mode not in ("L", "RGB") or not image.fp:
        return None
    image.fp.seek(0)
    data = image.fp.read(MOST_AT_ONCE)
    try:
        if simplejpeg.decode_jpeg_header(data)[:2] != (image.height, image.width):
            return None
        pixels: np.ndarray = simplejpeg.decode_jpeg(data, "RGB")
    except ValueError:
        return None
    return pixels


def to_rgb(image: Image.Image, path: str) -> np.ndarray:
    """Return a decoded image as (H, W, 3) uint8; ``path`` names it in messages."""
    if image.mode.startswith("I"):
        # Pillow's own conversion clips 16 bits at 255, which leaves a white image.
        values = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        grey = (values >> 8 if image.mode != "I" or values.max(initial=0) > 255 else values).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode == "F":
        raise bad_sample("not_an_image", "a float image has no known scale", path, "mode F", "8 or 16 bits")
    return np.array(image if image.mode == "RGB" else image.convert("RGB"), dtype=np.uint8)


def open_image_file(source: str | Path | io.BytesIO, where: str | None = None) -> Image.Image:
    """Decode an image file in the mode it is stored in; arguments and errors are those of :func:`read_picture`."""
    with decoding(source, where or str(source)) as image:
        image.load()
    return image


def foreground_of(image: Image.Image) -> np.ndarray:
    """Return where a mask that is stored as an image is above 0, in any mode: (H, W) bool.

    Of palette images the index counts (not its colour), of colour images any colour channel; transparency is ignored.
    """
    values = np.asarray(image)
    if values.ndim == 2:
        return np.ascontiguousarray(values > 0)
    num_colours = values.shape[2] - 1 if image.mode in ("LA", "PA", "La", "RGBA", "RGBa") else values.shape[2]
    return np.ascontiguousarray((values[:, :, :num_colours] > 0).any(axis=2))


@contextmanager
def decoding(source: str | Path | io.BytesIO, path: str) -> Iterator[Image.Image]:
    """Give the opened image of ``source`` to be decoded; its size is known and within the limits, no pixel is read.

    What Pillow raises about it, inside as well, becomes a SampleError; ``path`` names the image there.
    """
    try:
        if not (source.getbuffer().nbytes if isinstance(source, io.BytesIO) else check_file(source)):
            raise OSError("it is empty")
        image: Image.Image = Image.open(source)
        check_pixels(image.height, image.width, path)
        if image.format not in FORMATS:
            raise UnidentifiedImageError(f"a file of the format {image.format}")
        yield image
    except SampleError:
        raise
    except FileNotFoundError as error:
        raise bad_sample("missing_file", "an image file is missing", path, fix="copy it to its place") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        expected = f"at most {max_pixels():,} pixels (data.max_pixels)"
        raise bad_sample("too_large", "an image is too large", path, str(error), expected) from error
    except Exception as error:  # damaged files raise nearly anything, depending on the format and on the place
        if isinstance(error, (UnidentifiedImageError, RefusedFile)):
            expected = "JPEG, PNG or another image"
            raise bad_sample("not_an_image", "a file is not a usable image", path, str(error), expected) from error
        fix = "download or copy the file again"
        raise bad_sample("truncated_file", "an image file is damaged", path, error, "a complete file", fix) from error
