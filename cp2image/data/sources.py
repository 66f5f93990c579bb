"""Fetch an input file and refuse what is no data. Floor 1: `storage`, tifffile; no Ray, torch."""

import tifffile

from cp2image import storage
from cp2image.errors import Cp2ImageError, StorageError

_POINTER = b"version https://git-lfs.github.com/spec/"


def refuse_placeholder(uri: str, start: bytes, error: type[Cp2ImageError]) -> None:
    """Raise ``error`` when a file's first bytes show that its content was never fetched.

    Parameters
    ----------
    uri
        File the bytes come from, for the message.
    start
        At least its first 64 bytes, or all of it.
    error
        Class of error to raise.
    """
    if not start:
        raise error(f"{uri}: the file is empty (0 bytes); copy it again")
    if start.startswith(_POINTER):
        raise error(
            f"{uri}: found a Git LFS pointer, a few lines of text in place of the file; "
            "fetch the content with `git lfs pull`"
        )


def read_source(uri: str, error: type[Cp2ImageError]) -> bytes:
    """Return the bytes of one input file.

    Raises
    ------
    StorageError
        If the file is missing or cannot be read.
    Cp2ImageError
        ``error``, if it is empty or a Git LFS pointer.
    """
    content = storage.read_bytes(uri)
    refuse_placeholder(uri, content[:64], error)
    return content


def is_file(uri: str) -> bool:
    """Tell whether ``uri`` is one file, not a folder and not missing.

    Raises
    ------
    StorageError
        If that cannot be told.
    """
    files, path = storage.filesystem(uri)
    return storage.attempt(uri, "look up", lambda: bool(files.get_file_info(path).is_file))


def read_start(uri: str, error: type[Cp2ImageError]) -> bytes:
    """Return the first bytes of one input file, refusing what `read_source` refuses.

    Raises
    ------
    StorageError
        If the file is missing or cannot be read.
    Cp2ImageError
        ``error``, if it is empty or a Git LFS pointer.
    """
    if not storage.exists(uri):
        raise StorageError(f"{uri}: not found; check the path, the bucket and its region")
    files, path = storage.filesystem(uri)

    def read() -> bytes:
        with files.open_input_file(path) as source:
            return bytes(source.read(64))

    start = storage.attempt(uri, "read", read)
    refuse_placeholder(uri, start, error)
    return start


def refuse_truncated(
    uri: str, tiff: tifffile.TiffFile, content: bytes, error: type[Cp2ImageError]
) -> None:
    """Raise ``error`` when pixel data or pages of a TIFF lie beyond its end.

    tifffile reads such files as far as they go, without an error.

    Parameters
    ----------
    uri
        File the bytes come from, for the message.
    tiff
        The opened file.
    content
        All its bytes.
    error
        Class of error to raise.
    """
    ends = [
        offset + length
        for page in tiff.pages
        for offset, length in zip(page.dataoffsets, page.databytecounts, strict=True)
    ]
    link, width = tiff.pages.next_page_offset, tiff.tiff.offsetsize
    chain_ends = content[link : link + width] == bytes(width)
    if not ends or max(ends) > len(content) or not chain_ends:
        raise error(
            f"{uri}: found a truncated TIFF: {len(content)} bytes with {len(tiff.pages)} readable "
            f"pages whose pixels reach to byte {max(ends, default=0)}; copy it again"
        )
