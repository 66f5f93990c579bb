"""URIs to files: local paths and ``s3://``. Ground floor: pyarrow only.

Endpoint, region and credentials come from the standard AWS variables (``AWS_ENDPOINT_URL``,
``AWS_REGION``, ``AWS_ACCESS_KEY_ID`` …). A public bucket that is read without credentials is
written ``s3://anonymous@bucket/path``. Every write serialises first and stores the bytes in one
piece, because both S3 libraries commit a partial object when an exception leaves their writer.
"""

import os
import random
import time
import uuid
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from pyarrow import fs as arrow_fs

from cp2image.errors import StorageError

DEADLINE_S = 120.0
"""Seconds after which an operation that keeps failing is given up."""
_CONNECT_TIMEOUT_S, _REQUEST_TIMEOUT_S, _ATTEMPTS = 5.0, 30.0, 4
_FINAL = ("ACCESS_DENIED", "SIGNATURE_DOES_NOT_MATCH", "INVALID_ACCESS_KEY", "NO_SUCH_BUCKET")
_T = TypeVar("_T")


def join(uri: str, *parts: str) -> str:
    """Append path segments to a local path or URI.

    >>> join("s3://screens/run1/", "plate=P1", "part.parquet")
    's3://screens/run1/plate=P1/part.parquet'
    """
    return "/".join([str(uri).rstrip("/") or "/", *(part.strip("/") for part in parts)])


def name_of(uri: str) -> str:
    """Return the last segment of a path or URI."""
    return str(uri).rstrip("/").rsplit("/", 1)[-1]


def filesystem(uri: str) -> tuple[arrow_fs.FileSystem, str]:
    """Resolve ``uri`` to a pyarrow filesystem and the path on it.

    Raises
    ------
    StorageError
        If the scheme is neither a local path, ``file://`` nor ``s3://``.
    """
    uri = str(uri)
    if "://" not in uri:
        return arrow_fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(uri))
    parts = urlsplit(uri)
    if parts.scheme == "file":
        return arrow_fs.LocalFileSystem(), unquote(parts.path)
    if parts.scheme != "s3" or not parts.hostname:
        raise StorageError(f"{uri}: scheme {parts.scheme!r} is not known; use a path or s3://bucket/")
    user, _, bucket = parts.netloc.rpartition("@")
    if user not in ("", "anonymous"):
        raise StorageError(
            f"s3://…@{bucket}: credentials do not belong into a URI (it is logged); "
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    return _s3(user == "anonymous", _aws_settings()), bucket + uri.split(parts.netloc, 1)[1]


def _aws_settings() -> tuple[str | None, ...]:
    names = (
        ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
        ("AWS_REGION", "AWS_DEFAULT_REGION"),
        ("AWS_ACCESS_KEY_ID",),
        ("AWS_SECRET_ACCESS_KEY",),
        ("AWS_SESSION_TOKEN",),
    )
    return tuple(next((os.environ[n] for n in group if os.environ.get(n)), None) for group in names)


@lru_cache(maxsize=8)
def _s3(anonymous: bool, settings: tuple[str | None, ...]) -> arrow_fs.S3FileSystem:
    endpoint, region, key, secret, token = settings
    options: dict[str, Any] = {}
    if endpoint:
        scheme, _, host = endpoint.rpartition("://")
        options |= {"endpoint_override": host.rstrip("/"), "scheme": scheme or "https"}
    if region or endpoint:
        options["region"] = region or "us-east-1"
    if not anonymous and key:
        options |= {"access_key": key, "secret_key": secret, "session_token": token}
    return arrow_fs.S3FileSystem(
        anonymous=anonymous,
        connect_timeout=_CONNECT_TIMEOUT_S,
        request_timeout=_REQUEST_TIMEOUT_S,
        retry_strategy=arrow_fs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS),
        **options,
    )


def _retry(uri: str, action: str, call: Callable[[], _T], deadline_s: float = DEADLINE_S) -> _T:
    started, wait = time.monotonic(), 0.2
    while True:
        try:
            return call()
        except FileNotFoundError as error:
            raise StorageError(f"{uri}: not found; check the path, the bucket and its region") from error
        except (PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError) as error:
            raise StorageError(f"{uri}: cannot {action}: {error.strerror or error}") from error
        except Exception as error:  # pyarrow and the AWS SDK raise more than OSError
            remote, text = uri.startswith("s3://"), str(error)
            code = next((code for code in _FINAL if code in text), "")
            if code or not remote or time.monotonic() - started + wait > deadline_s:
                raise StorageError(f"{uri}: cannot {action}: {_reason(code, text)}") from error
            time.sleep(wait * (0.5 + random.random()))
            wait = min(wait * 2, 10.0)


def _reason(code: str, text: str) -> str:
    if code == "SIGNATURE_DOES_NOT_MATCH":
        return "the S3 secret is wrong (AWS_SECRET_ACCESS_KEY)"
    if code == "INVALID_ACCESS_KEY":
        return "the S3 key is not known to the store (AWS_ACCESS_KEY_ID)"
    if code == "ACCESS_DENIED":
        return (
            "access denied; check AWS_ACCESS_KEY_ID and its rights, or write a public bucket as "
            "s3://anonymous@bucket/…"
        )
    if code == "NO_SUCH_BUCKET":
        return "the bucket does not exist at this endpoint (AWS_ENDPOINT_URL, AWS_REGION)"
    return text


def read_bytes(uri: str) -> bytes:
    """Return the whole content of one file.

    Raises
    ------
    StorageError
        If it is missing, denied, or the store keeps failing for `DEADLINE_S` seconds.
    """
    files, path = filesystem(uri)

    def read() -> bytes:
        with files.open_input_file(path) as source:
            return bytes(source.read())

    return _retry(uri, "read", read)


def write_bytes(uri: str, data: bytes) -> None:
    """Store ``data`` under ``uri`` as one object, whole or not at all, and check its size.

    Raises
    ------
    StorageError
        If the place cannot be written or the stored size differs.
    """
    files, path = filesystem(uri)
    local = isinstance(files, arrow_fs.LocalFileSystem)
    target = f"{path}.{uuid.uuid4().hex[:8]}.tmp" if local else path

    def write() -> None:
        if local:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        try:
            with files.open_output_stream(target) as sink:
                sink.write(data)
            size = files.get_file_info(target).size
            if size != len(data):
                raise OSError(f"stored {size} of {len(data)} bytes")
            if local:
                os.replace(target, path)
        finally:
            if local:
                Path(target).unlink(missing_ok=True)

    _retry(uri, "write", write)


def exists(uri: str) -> bool:
    """Tell whether a file or folder is there (raises `StorageError` if that cannot be told)."""
    files, path = filesystem(uri)

    def look() -> bool:
        return bool(files.get_file_info(path).type != arrow_fs.FileType.NotFound)

    return _retry(uri, "look up", look)


def list_files(uri: str, suffix: str = "", *, recursive: bool = True) -> list[str]:
    """Return the URIs of the files below a folder, sorted; empty if there is no such folder."""
    files, path = filesystem(uri)
    selector = arrow_fs.FileSelector(path.rstrip("/"), allow_not_found=True, recursive=recursive)

    def look() -> list[str]:
        return [info.path for info in files.get_file_info(selector) if info.is_file]

    prefix = uri.rstrip("/")
    skip = len(path.rstrip("/"))
    found = _retry(uri, "list", look)
    return sorted(prefix + name[skip:] for name in found if name.endswith(suffix))


def move(source: str, target: str) -> None:
    """Move one file within a filesystem (rename locally; server-side copy and delete on S3)."""
    files, path = filesystem(source)
    goal = filesystem(target)[1]

    def rename() -> None:
        if isinstance(files, arrow_fs.LocalFileSystem):
            Path(goal).parent.mkdir(parents=True, exist_ok=True)
        files.move(path, goal)

    _retry(target, "publish", rename)


def delete_tree(uri: str) -> None:
    """Remove a folder that this program made and all below it; a missing one is no error."""
    files, path = filesystem(uri)
    if files.get_file_info(path).type == arrow_fs.FileType.Directory:
        _retry(uri, "clear", lambda: files.delete_dir(path))


def delete_file(uri: str) -> None:
    """Remove one file that this program made; a missing one is no error."""
    files, path = filesystem(uri)
    if files.get_file_info(path).type == arrow_fs.FileType.File:
        _retry(uri, "remove", lambda: files.delete_file(path))
