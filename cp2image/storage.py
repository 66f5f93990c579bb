"""URIs to files: local paths and ``s3://``. Ground floor: pyarrow only.

Endpoint, region and credentials come from the standard AWS variables (``AWS_ENDPOINT_URL``,
``AWS_REGION``, ``AWS_ACCESS_KEY_ID`` …). A public bucket that is read without credentials is
written ``s3://anonymous@bucket/path``.

pyarrow stores a partial object when an exception leaves its writer, a signal's included, and waits
for minutes on a server that stalls. So every write has all its bytes beforehand, and each call to
S3 runs in a thread of its own, which no signal interrupts and which is left behind when
`DEADLINE_S` is over.
"""

import getpass
import os
import random
import re
import shutil
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from functools import lru_cache
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar
from urllib.parse import unquote

import pyarrow as pa
from pyarrow import fs as arrow_fs

from cp2image.errors import StorageError

DEADLINE_S = 120.0
"""Seconds after which an operation on S3 that keeps failing or gets no answer is given up."""
_CONNECT_TIMEOUT_S, _REQUEST_TIMEOUT_S, _ATTEMPTS = 5.0, 20.0, 3
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]+")
_SCHEME = re.compile(r"(s3|file|gs|https?|abfss?|az):", re.IGNORECASE)
_LEFTOVER = re.compile(r"/\.[0-9a-f]{32}\.tmp$")
_AWS_ERROR = re.compile(r"AWS Error (?P<code>[A-Z_]+)(?: \(HTTP status (?P<status>\d+)\))?")
_SECRETS_HINT = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead"
_REASONS = {
    "ACCESS_DENIED": "access denied; check AWS_ACCESS_KEY_ID and its rights, or write a public "
    "bucket as s3://anonymous@bucket/…",
    "INVALID_ACCESS_KEY_ID": "the S3 key is not known to the store (AWS_ACCESS_KEY_ID)",
    "NO_SUCH_BUCKET": "the bucket does not exist at this endpoint (AWS_ENDPOINT_URL, AWS_REGION)",
    "NO_SUCH_KEY": "no such object",
    "SIGNATURE_DOES_NOT_MATCH": "the S3 secret is wrong (AWS_SECRET_ACCESS_KEY), or its key is "
    "not known to this store (AWS_ACCESS_KEY_ID)",
}
"""Errors that no repetition mends, and what they mean."""
_T = TypeVar("_T")


def join(uri: str, *parts: str) -> str:
    """Append path segments to a local path or URI.

    >>> join("s3://screens/run1/", "plate=P1", "part.parquet")
    's3://screens/run1/plate=P1/part.parquet'
    """
    start = str(uri)
    tail = "/".join(part.strip("/") for part in parts if part.strip("/"))
    stripped = start.rstrip("/")
    if not stripped or stripped.endswith(":"):  # nothing, the root or a bare scheme
        return start + tail
    return f"{stripped}/{tail}" if tail else stripped


def name_of(uri: str) -> str:
    """Return the last segment of a path or URI."""
    return str(uri).rstrip("/").rsplit("/", 1)[-1]


def filesystem(uri: str) -> tuple[arrow_fs.FileSystem, str]:
    """Resolve ``uri`` to a pyarrow filesystem and the path on it.

    Raises
    ------
    StorageError
        If it is empty, its scheme is neither a local path, ``file://`` nor ``s3://``, or it
        holds credentials, which are not repeated in the message.
    """
    bucket, path = split_uri(uri)
    if not bucket:
        return arrow_fs.LocalFileSystem(), path
    user, _, name = bucket.rpartition("@")
    return _s3(user == "anonymous", _aws_settings()), f"{name}/{path}".rstrip("/")


def split_uri(uri: str) -> tuple[str, str]:
    """Take a path or URI apart without touching what it names.

    Returns
    -------
    tuple of str
        Bucket (``anonymous@bucket`` where it is written so) and key; or nothing and the absolute
        local path.

    Raises
    ------
    StorageError
        As `filesystem`.
    """
    uri = str(uri)
    scheme, separator, rest = uri.partition("://")
    if not uri.strip():
        raise StorageError("an empty path was given where a file or folder is expected")
    if not separator:
        if _SCHEME.match(uri):
            raise StorageError("a URI has '://' after its scheme; write s3://bucket/path")
        return "", os.path.abspath(os.path.expanduser(uri))
    if scheme == "file":
        if not rest.startswith("/"):
            raise StorageError(f"{uri}: write file:///folder/file with three slashes, or a path")
        return "", os.path.abspath(unquote(rest))
    if scheme != "s3":
        raise StorageError(
            f"{scheme}://…: the scheme {scheme!r} is not known; use a local path or s3://bucket/…"
        )
    authority, _, key = rest.partition("/")
    user, _, bucket = authority.rpartition("@")
    if user not in ("", "anonymous") or ":" in authority:
        raise StorageError(
            f"s3://…: credentials do not belong into a URI, which is logged; {_SECRETS_HINT}"
        )
    if not _BUCKET.fullmatch(bucket):
        if not bucket:
            raise StorageError("no bucket is named; write s3://bucket/path")
        raise StorageError(f"s3://{authority}/…: {bucket!r} is no bucket; write s3://bucket/path")
    return authority, key


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
        if scheme not in ("http", "https"):
            raise StorageError(
                f"AWS_ENDPOINT_URL = {endpoint!r}: expected http://host:port or https://host"
            )
        options |= {"endpoint_override": host.rstrip("/"), "scheme": scheme}
    if region or endpoint:
        options["region"] = region or "us-east-1"
    if not anonymous and (key or secret):
        if not (key and secret):
            absent = "AWS_SECRET_ACCESS_KEY" if key else "AWS_ACCESS_KEY_ID"
            raise StorageError(f"{absent} is not set, the other half of the S3 credentials is")
        options |= {"access_key": key, "secret_key": secret, "session_token": token}
    return arrow_fs.S3FileSystem(
        anonymous=anonymous,
        connect_timeout=_CONNECT_TIMEOUT_S,
        request_timeout=_REQUEST_TIMEOUT_S,
        retry_strategy=arrow_fs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS),
        **options,
    )


def _is_local(files: arrow_fs.FileSystem) -> bool:
    return isinstance(files, arrow_fs.LocalFileSystem)


def attempt(uri: str, action: str, call: Callable[[], _T]) -> _T:
    """Do something with the file system of ``uri`` and return what comes of it.

    On S3 it runs in a thread of its own and is repeated after failures that may mend, with pauses
    that grow, until `DEADLINE_S` is over; so it must be something that can be done twice.

    Parameters
    ----------
    uri
        What it is done with.
    action
        For the message, as in "cannot read".
    call
        Does it; errors of this package pass through.

    Raises
    ------
    StorageError
        If it fails for good: says where, what and why.
    """
    files, path = filesystem(uri)
    if not _is_local(files):
        return _retry(uri, action, call)
    try:
        return call()
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"{uri}: cannot {action}: {_local_reason(error, path)}") from error


def _local_reason(error: OSError, path: str) -> str:
    wanted = Path(error.filename or path)
    if isinstance(error, IsADirectoryError):
        return f"{error.filename2 or wanted} is a folder where a file is expected"
    place = next(p for p in (wanted, *wanted.parents) if os.path.exists(p))
    if isinstance(error, FileNotFoundError):
        absent = wanted.relative_to(place).parts[:1]
        return f"not found: {place} holds no {absent[0]!r}" if absent else str(error)
    if isinstance(error, FileExistsError | NotADirectoryError):
        return f"{place} is a file where a folder is expected"
    if isinstance(error, PermissionError):
        return f"user {getpass.getuser()!r} has no permission on {place}"
    return error.strerror or str(error)


def _retry(uri: str, action: str, call: Callable[[], _T]) -> _T:
    began, wait = time.monotonic(), 0.2
    ends = began + DEADLINE_S
    while True:
        try:
            return _in_thread(call, ends - time.monotonic())
        except StorageError:
            raise
        except FileNotFoundError as error:
            what = "not found; check the path, the bucket and its region"
            raise StorageError(f"{uri}: cannot {action}: {what}") from error
        except (pa.ArrowInvalid, PermissionError, IsADirectoryError, NotADirectoryError) as error:
            raise StorageError(f"{uri}: cannot {action}: {error}") from error
        except (OSError, pa.ArrowException, RuntimeError) as error:
            pause = wait * (0.5 + random.random())
            if _is_final(str(error)) or time.monotonic() + pause > ends:
                why = _why_denied(uri, error) or _reason(error, time.monotonic() - began)
                raise StorageError(f"{uri}: cannot {action}: {why}") from error
            time.sleep(pause)
            wait = min(wait * 2, 10.0)


def _in_thread(call: Callable[[], _T], seconds: float) -> _T:
    outcome: Future[_T] = Future()

    def work() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    Thread(target=work, name="cp2image-s3", daemon=True).start()
    return outcome.result(timeout=seconds)


def _is_final(text: str) -> bool:
    found = _AWS_ERROR.search(text)
    status = int(found["status"] or 0) if found else 0
    return bool(found and found["code"] in _REASONS) or (
        300 <= status < 500 and status not in (408, 429)
    )


def _why_denied(uri: str, error: Exception) -> str:
    """Ask again where a look at one file was denied: only a listing's answer says for what."""
    if "ACCESS_DENIED" not in str(error):
        return ""
    files, path = filesystem(uri)
    nothing = arrow_fs.FileSelector(join(path.partition("/")[0], ".cp2image"), allow_not_found=True)
    try:
        _in_thread(lambda: files.get_file_info(nothing), _REQUEST_TIMEOUT_S)
    except OSError as answer:
        found = _AWS_ERROR.search(str(answer))
        return _REASONS.get(found["code"], "") if found else ""
    return ""


def _reason(error: Exception, seconds: float) -> str:
    found = _AWS_ERROR.search(str(error))
    code = found["code"] if found else ""
    if isinstance(error, TimeoutError) or code == "NETWORK_CONNECTION":
        endpoint = _aws_settings()[0] or "AWS"
        where = f"no answer from {endpoint} (AWS_ENDPOINT_URL) in {seconds:.0f} s"
        return f"{where}; {error}".rstrip("; ")
    return _REASONS.get(code, str(error))


def read_bytes(uri: str) -> bytes:
    """Return the whole content of one file.

    Raises
    ------
    StorageError
        If it is missing, denied, or the store keeps failing for `DEADLINE_S` seconds.
    """
    files, path = filesystem(uri)

    def read() -> bytes:
        if _is_local(files):
            return Path(path).read_bytes()
        with files.open_input_file(path) as source:
            return bytes(source.read())

    return attempt(uri, "read", read)


def write_bytes(uri: str, data: bytes) -> None:
    """Store ``data`` under ``uri``, whole or not at all; folders are made as needed.

    Raises
    ------
    StorageError
        If the place cannot be written or the stored size differs.
    """
    files, path = filesystem(uri)
    content = pa.py_buffer(data)
    if not _is_local(files) and "/" not in path:
        raise StorageError(f"{uri}: is a bucket; a file needs a name in it")

    def write() -> None:
        if _is_local(files):
            _replace(Path(path), content)
            return
        with files.open_output_stream(path, compression=None) as sink:
            sink.write(content)
        size = files.get_file_info(path).size
        if size != content.size:
            raise OSError(f"stored {size} of {content.size} bytes")

    attempt(uri, "write", write)


def _replace(path: Path, content: pa.Buffer) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{uuid.uuid4().hex}.tmp"  # hidden: readers of datasets skip it
    try:
        with temporary.open("xb") as sink:
            sink.write(content)
            sink.flush()
            os.fsync(sink.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def exists(uri: str) -> bool:
    """Tell whether a file or folder is there (raises `StorageError` if that cannot be told)."""
    files, path = filesystem(uri)

    def look() -> bool:
        return bool(files.get_file_info(path).type != arrow_fs.FileType.NotFound)

    return attempt(uri, "look up", look)


def list_files(uri: str, suffix: str = "", *, recursive: bool = True) -> list[str]:
    """Return the URIs of the files below a folder, sorted; empty if there is no such folder.

    What an interrupted local write has left behind is not listed.
    """
    files, path = filesystem(uri)
    selector = arrow_fs.FileSelector(path, allow_not_found=True, recursive=recursive)

    def look() -> list[str]:
        return [info.path for info in files.get_file_info(selector) if info.is_file]

    found = (name[len(path) :] for name in attempt(uri, "list", look) if name.endswith(suffix))
    return sorted(
        join(uri, name) for name in found if not re.search(r"/\.[0-9a-f]{32}\.tmp$", name)
    )


def move(source: str, target: str) -> None:
    """Move one file within a filesystem (rename locally; server-side copy and delete on S3).

    Raises
    ------
    StorageError
        If there is no such file, or the two are not on the same filesystem.
    """
    files, path = filesystem(source)
    other, goal = filesystem(target)
    if not files.equals(other):
        raise StorageError(f"cannot move {source} to {target}: they are on different file systems")
    tried = False

    def rename() -> None:
        nonlocal tried
        again, tried = tried, True
        if _is_local(files):
            Path(goal).parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, goal)
        elif not (again and not exists(source) and exists(target)):
            files.move(path, goal)

    attempt(source, f"move to {target}", rename)


def delete_tree(uri: str) -> None:
    """Remove a folder that this program made and all below it; a missing one is no error.

    Raises
    ------
    StorageError
        If it cannot be removed, or is a file, a link, a whole bucket, the home folder, or a
        folder that holds the working directory.
    """
    files, path = filesystem(uri)
    if _is_local(files):
        here = (Path.cwd(), Path.home())
        if any(Path(path) in (place, *place.parents) for place in here):
            raise StorageError(f"{uri}: is or holds the home or working folder, not removed")
    elif "/" not in path:
        raise StorageError(f"{uri}: is a whole bucket, not removed")

    def clear() -> None:
        if not _is_local(files):
            if files.get_file_info(path).type != arrow_fs.FileType.NotFound:
                files.delete_dir(path)
        elif os.path.lexists(path):
            shutil.rmtree(path)

    attempt(uri, "remove", clear)


def delete_file(uri: str) -> None:
    """Remove a file that this program made; a missing one is no error.

    Raises
    ------
    StorageError
        If it cannot be removed, or is a folder.
    """
    files, path = filesystem(uri)

    def clear() -> None:
        if files.get_file_info(path).type != arrow_fs.FileType.NotFound:
            files.delete_file(path)

    attempt(uri, "remove", clear)
