"""Find the image files that a feature table names. Floor 1: pandas; no Ray, torch."""

from collections.abc import Mapping, Sequence
from urllib.parse import unquote

import pandas as pd

from cp2image import storage
from cp2image.columns import require_columns
from cp2image.data.naming import names_of
from cp2image.errors import TableError


def locate_fields(
    images: pd.DataFrame,
    channels: Sequence[str],
    *,
    root: str | None = None,
    replace: Mapping[str, str] | None = None,
) -> pd.DataFrame:
    """Return the URI of every channel's file for every image set.

    CellProfiler writes the folders of the machine it ran on. So an absolute folder is replaced:
    by ``replace`` where its start is listed there, else by ``root`` where given. A relative
    folder, as in BBBC021's metadata, is kept below ``root``.

    Parameters
    ----------
    images
        Image sets with ``FileName_{channel}`` and, optionally, ``PathName_{channel}``; or only
        ``URL_{channel}``.
    channels
        Names of the channels, in the order wanted.
    root
        Folder of the images, path or URI.
    replace
        Start of a folder in the table → start of the real one, such as
        ``{"/home/ubuntu/bucket": "s3://anonymous@cellpainting-gallery"}``.

    Returns
    -------
    One column per channel, the index of ``images``.

    Raises
    ------
    ColumnError
        If the table names no file for a channel.
    TableError
        If an image set has no file for a channel.
    """
    found = {}
    for channel in channels:
        file, folder, url = (f"{part}_{channel}" for part in ("FileName", "PathName", "URL"))
        if file in images:
            folders = images[folder] if folder in images else [""] * len(images)
            names = images[file]
        else:
            require_columns(names_of(images), [url if url in images else file], "image table")
            whole = [_plain(text) for text in images[url]]
            folders = [text.rpartition("/")[0] for text in whole]
            names = pd.Series([text.rpartition("/")[2] for text in whole], index=images.index)
        missing = names.isna() | (names == "")
        if missing.any():
            row = images.loc[missing].iloc[0].filter(like="Metadata_").to_dict()
            raise TableError(f"no file of channel {channel!r} is named for image set {row}")
        found[channel] = [
            _resolve(_plain(place), str(name), root, replace or {})
            for place, name in zip(folders, names, strict=True)
        ]
    return pd.DataFrame(found, index=images.index)


def _plain(place: object) -> str:
    text = place.replace("\\", "/") if isinstance(place, str) else ""
    return unquote(text.removeprefix("file://").removeprefix("file:")) if "file:" in text else text


def _resolve(folder: str, name: str, root: str | None, replace: Mapping[str, str]) -> str:
    for start in sorted(replace, key=len, reverse=True):
        if folder.startswith(start):
            return storage.join(replace[start] + folder[len(start) :], name)
    absolute = folder.startswith("/") or "://" in folder or folder[1:3] == ":/"
    parts = [part for part in (None if absolute and root else folder, name) if part]
    return storage.join(root, *parts) if root else storage.join(parts[0], *parts[1:])
