"""Read fields of view as (channels, height, width). Floor 1: tifffile, imagecodecs, Pillow.

TIFF (8, 12-in-16 and 16 bit, float, multi-page, OME), PNG and JPEG; no Ray, torch.
"""

import io
from collections.abc import Sequence
from typing import Any

import imagecodecs
import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from cp2image.data.sources import read_source, refuse_truncated
from cp2image.errors import FieldError

MAX_CHANNELS = 8
_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PNG_START, _JPEG_START = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
_CHANNEL_AXES = "CSIQ"
_GREY_AXES = 2
_DTYPES = ("uint8", "uint16", "float32")
_RGB_ADVICE = (
    "; expected one grey plane per stain. Split it into one file per stain, or export the "
    "stains in grey"
)


def read_field(
    sources: Sequence[str], *, expected_channels: int, rgb: bool = False
) -> NDArray[Any]:
    """Read one field of view.

    Parameters
    ----------
    sources
        URIs: one single-channel file per channel, in the order wanted, or one file that holds
        all channels (multi-page, OME ``C`` axis or trailing channel axis). The same file named
        for every channel counts as one file.
    expected_channels
        Number of channels, 1 to 8.
    rgb
        Accept a red-green-blue file as three channels in that order.

    Returns
    -------
    Shape (channels, height, width) in the acquisition's own type: uint8, uint16 or float32
    (float16 and float64 become float32). Values are not rescaled.

    Raises
    ------
    StorageError
        If a file is missing or cannot be read.
    FieldError
        If a file is no image, truncated, empty, a Git LFS pointer, 1-bit, palette or RGB, of an
        unsupported type, holds another number of channels, or if the channels' sizes or types
        differ. Names the file and what was found in it.
    """
    if not 1 <= expected_channels <= MAX_CHANNELS:
        raise FieldError(f"{expected_channels} channels asked for; between 1 and 8 are supported")
    files = list(dict.fromkeys(sources)) if len(set(sources)) == 1 else list(sources)
    if len(files) not in (1, expected_channels):
        raise FieldError(
            f"{len(files)} files for {expected_channels} channels ({', '.join(files)}); "
            "give one file per channel or one file with all of them"
        )
    planes = [_read_planes(uri, rgb) for uri in files]
    wanted = expected_channels if len(files) == 1 else 1
    for uri, found in zip(files, planes, strict=True):
        if len(found) != wanted:
            raise FieldError(
                f"{uri}: found {len(found)} channels of {_size(found)} px, expected {wanted}; "
                "give one file per channel, or one file with all channels"
            )
        if (found.shape, found.dtype) != (planes[0].shape, planes[0].dtype):
            raise FieldError(
                f"{uri}: {_size(found)} px {found.dtype}, but {files[0]} of the same field is "
                f"{_size(planes[0])} px {planes[0].dtype}; all channels of a field must share "
                "size and type"
            )
    return np.concatenate(planes)


def _size(planes: NDArray[Any]) -> str:
    return f"{planes.shape[1]} x {planes.shape[2]}"


def _read_planes(uri: str, rgb: bool) -> NDArray[Any]:
    content = read_source(uri, FieldError)
    try:
        if content.startswith(_TIFF_STARTS):
            planes = _decode_tiff(uri, content, rgb)
        elif content.startswith(_PNG_START):
            planes = _decode_png(uri, content, rgb)
        elif content.startswith(_JPEG_START):
            with Image.open(io.BytesIO(content)) as picture:
                planes = _channels_first(uri, np.asarray(picture), rgb)
        else:
            raise FieldError(
                f"{uri}: found a file that starts with {content[:8]!r}; "
                "expected a TIFF, PNG or JPEG image"
            )
    except FieldError:
        raise
    except Exception as error:  # decoders raise errors of many kinds on damaged files
        reason = f"{type(error).__name__}: {error}"
        raise FieldError(
            f"{uri}: found a damaged image of {len(content)} bytes ({reason}); copy it again"
        ) from error
    return _check_pixels(uri, planes)


def _check_pixels(uri: str, planes: NDArray[Any]) -> NDArray[Any]:
    if planes.dtype.kind == "f":
        planes = planes.astype(np.float32)
        broken = int((~np.isfinite(planes)).sum())
        if broken:
            raise FieldError(
                f"{uri}: {broken} of {planes.size} pixels are NaN or infinite; "
                "export the image again with finite values"
            )
    planes = planes.astype(planes.dtype.newbyteorder("="), copy=False)
    if planes.dtype.name not in _DTYPES:
        raise FieldError(
            f"{uri}: found pixels of type {planes.dtype}; expected 8 or 16 bit unsigned integers "
            "or floats. Convert the image"
        )
    return planes


def _channels_first(uri: str, pixels: NDArray[Any], rgb: bool) -> NDArray[Any]:
    if pixels.ndim == _GREY_AXES:
        return pixels[np.newaxis]
    if not rgb:
        raise FieldError(
            f"{uri}: found a colour image of {pixels.shape[0]} x {pixels.shape[1]} px with "
            f"{pixels.shape[2]} colour planes{_RGB_ADVICE}"
        )
    return np.ascontiguousarray(np.moveaxis(pixels[..., :3], -1, 0))


def _decode_png(uri: str, content: bytes, rgb: bool) -> NDArray[Any]:
    with Image.open(io.BytesIO(content)) as picture:
        mode, (width, height) = picture.mode, picture.size
    if mode in ("1", "P", "PA", "LA", "La"):
        kind = {"1": "1-bit (black and white)", "P": "palette", "PA": "palette"}
        raise FieldError(
            f"{uri}: found a {kind.get(mode, 'grey and alpha')} PNG of {height} x {width} px; "
            "expected grey intensities of 8 or 16 bits. Is it a mask or a picture of one?"
        )
    return _channels_first(uri, imagecodecs.png_decode(content), rgb)


def _decode_tiff(uri: str, content: bytes, rgb: bool) -> NDArray[Any]:
    with tifffile.TiffFile(io.BytesIO(content)) as tiff:
        refuse_truncated(uri, tiff, content, FieldError)
        page = tiff.pages[0]
        _check_page(uri, page, rgb)
        if len(tiff.pages) == 1:
            return _order_axes(uri, page.asarray(), page.axes)
        if len(tiff.series) != 1:
            shapes = ", ".join(str(series.shape) for series in tiff.series[:4])
            raise FieldError(
                f"{uri}: found {len(tiff.series)} images of different shape in one file "
                f"({shapes}); expected the planes of one field"
            )
        series = tiff.series[0]
        if any(part is None for part in series.pages):
            raise FieldError(
                f"{uri}: its OME metadata speaks of {len(series.pages)} planes, the file holds "
                f"{len(tiff.pages)}; give one file with all channels or one plane per file"
            )
        return _order_axes(uri, series.asarray(), series.axes)


def _check_page(uri: str, page: Any, rgb: bool) -> None:
    size = f"{page.imagelength} x {page.imagewidth} px"
    photometric = tifffile.PHOTOMETRIC(page.photometric)
    if page.bitspersample == 1:
        raise FieldError(f"{uri}: found a 1-bit TIFF of {size}; expected 8 or 16 bits per pixel")
    if photometric == tifffile.PHOTOMETRIC.MINISBLACK:
        return
    if page.samplesperpixel > 1:
        if not rgb:
            raise FieldError(
                f"{uri}: found a colour ({photometric.name}) TIFF of {size} with "
                f"{page.samplesperpixel} colour planes{_RGB_ADVICE}"
            )
        return
    raise FieldError(
        f"{uri}: found a {photometric.name} TIFF of {size}; expected grey intensities where 0 is "
        "black. Convert the image"
    )


def _order_axes(uri: str, pixels: NDArray[Any], axes: str) -> NDArray[Any]:
    named = zip(axes, pixels.shape, strict=True)
    kept = [(name, length) for name, length in named if name in "YX" or length > 1]
    pixels = pixels.reshape([length for _, length in kept])
    others = [place for place, (name, _) in enumerate(kept) if name not in "YX"]
    if len(others) > 1 or any(kept[place][0] not in _CHANNEL_AXES for place in others):
        raise FieldError(
            f"{uri}: found axes {', '.join(f'{name}={length}' for name, length in kept)}; expected "
            "one plane per channel. Project or split z-stacks and time series first"
        )
    if not others:
        return pixels[np.newaxis]
    trailing = pixels.shape[-1] <= MAX_CHANNELS < min(pixels.shape[:-1])
    return np.ascontiguousarray(np.moveaxis(pixels, -1 if trailing else others[0], 0))
