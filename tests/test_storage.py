import os
import signal
import socket
import time
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moto.server import ThreadedMotoServer
from pyarrow import fs as arrow_fs

from cp2image import dataset, storage
from cp2image.data.schema import to_parquet
from cp2image.errors import StorageError
from cp2image.storage import (
    delete_tree,
    exists,
    filesystem,
    join,
    list_files,
    move,
    name_of,
    read_bytes,
    write_bytes,
)

NAMES = ["a b.txt", "plate=P 1/x.bin", "µ/é€.txt", "50%/a%20b.txt", "h#i?j.txt", "+&@:;,'.txt"]


@pytest.fixture(scope="module")
def server():
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def s3(server, monkeypatch):
    """Endpoint and keys in the environment, and an empty bucket."""
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setattr(storage, "DEADLINE_S", 20.0)
    scheme, _, host = server.partition("://")
    owner = arrow_fs.S3FileSystem(
        access_key="key",
        secret_key="secret",
        endpoint_override=host,
        scheme=scheme,
        region="us-east-1",
        allow_bucket_creation=True,
        allow_bucket_deletion=True,
    )
    owner.create_dir("screens")
    yield "s3://screens"
    owner.delete_dir("screens")


@pytest.fixture(params=["local", "s3"])
def place(request, tmp_path):
    return f"{tmp_path}/screens" if request.param == "local" else request.getfixturevalue("s3")


def endpoint_of(listening):
    return f"http://127.0.0.1:{listening.getsockname()[1]}"


# ------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (("s3://b/run/", "plate=P1", "x.parquet"), "s3://b/run/plate=P1/x.parquet"),
        (("s3://", "b"), "s3://b"),
        (("file:///", "a"), "file:///a"),
        (("/", "a"), "/a"),
        (("", "a"), "a"),
        (("runs", "/a/", "", "b/"), "runs/a/b"),
        (("runs/",), "runs"),
    ],
)
def test_paths_are_joined_with_single_slashes(parts, expected):
    assert join(*parts) == expected


def test_the_name_is_the_last_segment():
    assert [name_of(u) for u in ("s3://b/a/x.csv", "a/b/", "s3://b")] == ["x.csv", "b", "b"]


def test_local_paths_file_uris_and_buckets_resolve(tmp_path, s3):
    assert filesystem("~/x")[1] == f"{Path.home()}/x"
    assert filesystem(f"file://{tmp_path}/a%20b")[1] == f"{tmp_path}/a b"
    assert filesystem("s3://s3s/a%20b#c?d//")[1] == "s3s/a%20b#c?d"
    assert filesystem("s3://anonymous@lab/x")[1] == "lab/x"


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("", "an empty path"),
        ("  ", "an empty path"),
        ("gs://lab/x", "scheme 'gs' is not known"),
        ("https://me:hush@lab/x", "scheme 'https' is not known"),
        ("s3://", "no bucket is named"),
        ("s3:///x", "no bucket is named"),
        ("s3://[x", "is no bucket"),
        ("s3:/lab/x", "after its scheme"),
        ("file://share/x", "three slashes"),
        ("s3://AKIA:hush@lab/x", "credentials do not belong into a URI"),
        ("s3://AKIA:hu/sh@lab/x", "credentials do not belong into a URI"),
        ("s3://hush@lab/x", "credentials do not belong into a URI"),
    ],
)
@pytest.mark.parametrize("use", [read_bytes, exists, list_files, delete_tree])
def test_an_impossible_uri_is_refused_without_repeating_secrets(use, uri, expected):
    with pytest.raises(StorageError, match=expected) as caught:
        use(uri)
    assert "hu" not in str(caught.value)


# ------------------------------------------------------------------ both kinds of place


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_read_listed_moved_and_removed(place, name):
    uri = join(place, "run", name)
    assert not exists(uri)
    write_bytes(uri, b"first")
    write_bytes(uri, b"second")
    assert read_bytes(uri) == b"second"
    assert exists(uri)
    assert exists(join(place, "run"))
    assert list_files(place) == [uri]
    assert list_files(join(place, "run") + "/", name[-4:]) == [uri]
    target = join(place, "kept", name)
    move(uri, target)
    assert list_files(place) == [target]
    delete_tree(join(place, "kept"))
    assert list_files(place) == []
    delete_tree(join(place, "kept"))


def test_empty_and_large_contents_come_back(place):
    for data in (b"", os.urandom(11 << 20)):
        write_bytes(join(place, "x.bin"), data)
        assert read_bytes(join(place, "x.bin")) == data


def test_listing_takes_a_suffix_and_can_stay_in_the_folder(place):
    for name in ("b.json", "a.json", "a.txt", "deep/c.json"):
        write_bytes(join(place, "m", name), b"1")
    found = [join(place, "m", name) for name in ("a.json", "b.json", "deep/c.json")]
    assert list_files(join(place, "m"), ".json") == found
    assert list_files(join(place, "m"), ".json", recursive=False) == found[:2]
    assert list_files(join(place, "nothing")) == []


def test_a_missing_file_is_told(place):
    for use in (read_bytes, lambda uri: move(uri, join(place, "y"))):
        with pytest.raises(StorageError, match=r"none\.bin: cannot .*(not found|no such object)"):
            use(join(place, "none.bin"))


def test_removing_one_folder_leaves_its_neighbour(place):
    for name in ("plate=P1/x", "plate=P10/x"):
        write_bytes(join(place, name), b"1")
    delete_tree(join(place, "plate=P1"))
    assert list_files(place) == [join(place, "plate=P10/x")]


# ------------------------------------------------------------------ local


def leftovers(folder):
    return [path.name for path in Path(folder).rglob("*") if path.is_file()]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failing):
    target = f"{tmp_path}/x.json"
    write_bytes(target, b"old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os if failing == "fsync" else Path, failing, fail)
    with pytest.raises(StorageError, match=r"x\.json: cannot write: No space left on device"):
        write_bytes(target, b"new")
    monkeypatch.undo()
    assert (read_bytes(target), leftovers(tmp_path)) == (b"old", ["x.json"])


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_bytes(f"{tmp_path}/x.json", b"new")
    assert leftovers(tmp_path) == []


def test_what_a_killed_write_left_behind_is_not_listed(tmp_path):
    (tmp_path / f".{'0123456789abcdef' * 2}.tmp").write_bytes(b"half")
    (tmp_path / "x.json").write_bytes(b"whole")
    assert list_files(str(tmp_path)) == [f"{tmp_path}/x.json"]


def test_a_file_where_a_folder_is_expected_is_named(tmp_path):
    write_bytes(f"{tmp_path}/table.csv", b"1")
    for use in (lambda u: write_bytes(u, b"1"), read_bytes, delete_tree):
        uri = f"{tmp_path}/table.csv" if use is delete_tree else f"{tmp_path}/table.csv/a/b"
        with pytest.raises(StorageError, match=r"table\.csv is a file where a folder is expected"):
            use(uri)
    with pytest.raises(StorageError, match=r"table\.csv is a file where a folder"):
        move(f"{tmp_path}/table.csv", f"{tmp_path}/table.csv/x")
    assert leftovers(tmp_path) == ["table.csv"]


def test_a_folder_where_a_file_is_expected_is_named(tmp_path):
    (tmp_path / "cells").mkdir()
    for use in (lambda u: write_bytes(u, b"1"), read_bytes):
        with pytest.raises(StorageError, match="cells is a folder where a file is expected"):
            use(f"{tmp_path}/cells")
    assert leftovers(tmp_path) == []


def test_a_missing_folder_is_named_up_to_what_exists(tmp_path):
    with pytest.raises(StorageError, match=f"{tmp_path} holds no 'scren1'"):
        read_bytes(f"{tmp_path}/scren1/plate/x.csv")


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
        with pytest.raises(StorageError, match="has no permission on"):
            write_bytes(f"{tmp_path}/x", b"1")
        tmp_path.chmod(0o700)
    with pytest.raises(StorageError, match=r"/proc/cp2image/x: cannot write"):
        write_bytes("/proc/cp2image/x", b"1")


def test_permission_is_told_with_the_user_and_the_folder(tmp_path, monkeypatch):
    def fail(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(StorageError, match=f"user '.+' has no permission on {tmp_path}"):
        write_bytes(f"{tmp_path}/x", b"1")


def test_folders_that_no_step_made_are_not_removed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").touch()
    for uri in (".", "..", str(tmp_path), "/", "~", f"file://{tmp_path}"):
        with pytest.raises(StorageError, match="not removed"):
            delete_tree(uri)
    assert (tmp_path / "x").exists()


def test_a_link_is_not_followed_when_a_folder_is_removed(tmp_path):
    write_bytes(f"{tmp_path}/real/x", b"1")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(StorageError, match="symbolic link"):
        delete_tree(f"{tmp_path}/link")
    assert read_bytes(f"{tmp_path}/real/x") == b"1"


@given(data=st.binary(max_size=200))
def test_any_bytes_come_back(tmp_path_factory, data):
    uri = f"{tmp_path_factory.getbasetemp()}/any.bin"
    write_bytes(uri, data)
    assert read_bytes(uri) == data


def test_only_bytes_are_written(place):
    with pytest.raises(TypeError):
        write_bytes(join(place, "x"), "text")
    assert not exists(join(place, "x"))


# ------------------------------------------------------------------ S3


def test_a_missing_bucket_is_told(s3):
    with pytest.raises(StorageError, match="the bucket does not exist"):
        write_bytes("s3://no-such-bucket/x", b"1")
    with pytest.raises(StorageError, match="check the path, the bucket"):
        read_bytes("s3://no-such-bucket/x")
    assert not exists("s3://no-such-bucket/x")
    assert list_files("s3://no-such-bucket/x") == []


def test_a_whole_bucket_is_neither_written_nor_removed(s3):
    write_bytes(f"{s3}/x", b"1")
    for use in (delete_tree, lambda uri: write_bytes(uri, b"1")):
        for uri in (s3, f"{s3}/"):
            with pytest.raises(StorageError, match="bucket"):
                use(uri)
    assert list_files(s3) == [f"{s3}/x"]


def test_an_impossible_key_is_refused_at_once(s3):
    started = time.monotonic()
    with pytest.raises(StorageError, match="Empty path component"):
        write_bytes(f"{s3}/a//b", b"1")
    assert time.monotonic() - started < 1


def test_a_public_bucket_is_read_without_keys(s3, monkeypatch):
    write_bytes(f"{s3}/a/x", b"1")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert read_bytes("s3://anonymous@screens/a/x") == b"1"
    assert list_files("s3://anonymous@screens/a") == ["s3://anonymous@screens/a/x"]


def test_half_a_pair_of_keys_and_a_bare_endpoint_are_refused(s3, monkeypatch):
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StorageError, match="AWS_SECRET_ACCESS_KEY is not set"):
        exists(s3)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:9000")
    with pytest.raises(StorageError, match="expected http://host:port"):
        exists(s3)


def test_files_do_not_move_between_file_systems(s3, tmp_path):
    write_bytes(f"{tmp_path}/x", b"1")
    with pytest.raises(StorageError, match="different file systems"):
        move(f"{tmp_path}/x", f"{s3}/x")
    assert read_bytes(f"{tmp_path}/x") == b"1"


@pytest.mark.parametrize("kind", ["refusing", "silent"])
def test_an_endpoint_without_an_answer_is_given_up_at_the_deadline(s3, monkeypatch, kind):
    monkeypatch.setattr(storage, "DEADLINE_S", 0.4)
    monkeypatch.setattr(storage, "_REQUEST_TIMEOUT_S", 2.0)  # soon ends the calls left behind
    monkeypatch.setattr(storage, "_ATTEMPTS", 1)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        if kind == "silent":
            listening.listen()
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint_of(listening))
        for use in (read_bytes, exists, list_files, delete_tree, lambda u: write_bytes(u, b"1")):
            started = time.monotonic()
            with pytest.raises(StorageError, match=r"no answer from http://127\.0\.0\.1"):
                use("s3://screens/run/x")
            assert time.monotonic() - started < 1.5


class Flaky(arrow_fs.FileSystemHandler):
    """Local files behind a store that answers the first calls with an error."""

    def __init__(self, root, errors):
        self.root, self.errors, self.calls = Path(root), list(errors), 0
        self.files = arrow_fs.LocalFileSystem()

    def answer(self):
        self.calls += 1
        error = self.errors.pop(0) if self.errors else None
        if error:
            raise error

    def get_type_name(self):
        return "flaky"

    def normalize_path(self, path):
        return path

    def get_file_info(self, paths):
        self.answer()
        infos = self.files.get_file_info([str(self.root / path) for path in paths])
        return [
            arrow_fs.FileInfo(path, info.type, size=info.size)
            for path, info in zip(paths, infos, strict=True)
        ]

    def get_file_info_selector(self, selector):
        self.answer()
        found = sorted((self.root / selector.base_dir).rglob("*"))
        return self.get_file_info([str(path.relative_to(self.root)) for path in found])

    def open_input_file(self, path):
        self.answer()
        return self.files.open_input_file(str(self.root / path))

    def open_output_stream(self, path, metadata):
        self.answer()
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        return self.files.open_output_stream(str(self.root / path))

    def move(self, source, target):
        self.files.move(str(self.root / source), str(self.root / target))
        self.answer()

    def delete_dir(self, path):
        self.answer()
        self.files.delete_dir(str(self.root / path))

    open_input_stream = open_append_stream = copy_file = create_dir = delete_file = None
    delete_dir_contents = delete_root_dir_contents = None


@pytest.fixture
def flaky(tmp_path, monkeypatch):
    def build(*failures):
        handler = Flaky(tmp_path, failures)
        files = arrow_fs.PyFileSystem(handler)
        monkeypatch.setattr(storage, "filesystem", lambda uri: (files, uri.removeprefix("s3://")))
        monkeypatch.setattr(storage.time, "sleep", lambda _: None)
        return handler

    return build


BUSY = "AWS Error SLOW_DOWN (HTTP status 503) during PutObject operation: reduce your rate"


@pytest.mark.parametrize(
    "use",
    [
        lambda u: write_bytes(u, b"1"),
        read_bytes,
        exists,
        list_files,
        lambda u: move(u, "s3://b/y"),
        lambda u: delete_tree("s3://b/f"),
    ],
    ids=["write", "read", "exists", "list", "move", "delete"],
)
def test_a_store_that_is_busy_twice_is_asked_a_third_time(flaky, tmp_path, use):
    (tmp_path / "b" / "f").mkdir(parents=True)
    (tmp_path / "b" / "x").write_bytes(b"1")
    handler = flaky(OSError(BUSY), OSError(BUSY.replace("SLOW_DOWN", "UNKNOWN")))
    use("s3://b/x")
    assert handler.errors == []


@pytest.mark.parametrize("busy", [0, 1, 2, 3])
def test_cells_are_read_though_the_store_is_busy_at_any_moment(flaky, tmp_path, monkeypatch, busy):
    (tmp_path / "b").mkdir()
    table = pa.table({"Metadata_Well": ["A01", "A02", "A03"], "value": [1.0, 2.0, 3.0]})
    (tmp_path / "b" / "x").write_bytes(to_parquet(table, row_group=2))
    handler = flaky(*[None] * busy, OSError(BUSY))
    monkeypatch.setattr(dataset, "filesystem", storage.filesystem)
    found = dataset.read_range(dataset.CellRange("P", 0, "s3://b/x", 1, 2), ["value"])
    assert found["value"].to_pylist() == [2.0, 3.0]
    dataset.columns_of(dataset.CellRange("P", 0, "s3://b/x", 1, 2))
    assert handler.errors == []


def test_a_store_that_fails_while_cells_are_read_is_named(flaky, tmp_path, monkeypatch):
    flaky(*[OSError(BUSY)] * 10_000)
    monkeypatch.setattr(dataset, "filesystem", storage.filesystem)
    monkeypatch.setattr(storage, "DEADLINE_S", 0.3)
    with pytest.raises(StorageError, match=r"s3://b/x: cannot read: .*reduce your rate"):
        dataset.read_range(dataset.CellRange("P", 0, "s3://b/x", 0, 1))


def test_a_move_whose_answer_was_lost_is_not_done_twice(flaky, tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x").write_bytes(b"1")
    flaky(OSError("AWS Error NETWORK_CONNECTION during CopyObject operation: reset"))
    move("s3://b/x", "s3://b/y")
    assert (tmp_path / "b" / "y").read_bytes() == b"1"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        ("AWS Error ACCESS_DENIED during HeadObject operation: No response body", "anonymous@"),
        ("AWS Error SIGNATURE_DOES_NOT_MATCH during PutObject operation: x", "secret is wrong"),
        ("AWS Error INVALID_ACCESS_KEY_ID during PutObject operation: x", "key is not known"),
        ("AWS Error UNKNOWN (HTTP status 400) during x operation: ExpiredToken", "ExpiredToken"),
        ("AWS Error UNKNOWN (HTTP status 301) during x operation: other region", "other region"),
    ],
)
def test_an_error_that_repetition_does_not_mend_is_told_at_once(flaky, error, expected):
    handler = flaky(*[OSError(error)] * 3)
    with pytest.raises(StorageError, match=expected):
        read_bytes("s3://b/x")
    assert handler.calls == (2 if "ACCESS_DENIED" in error else 1)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("AWS Error SIGNATURE_DOES_NOT_MATCH during ListObjectsV2 operation: x", "secret is wrong"),
        ("AWS Error INVALID_ACCESS_KEY_ID during ListObjectsV2 operation: x", "key is not known"),
        ("AWS Error UNKNOWN (HTTP status 500) during ListObjectsV2 operation: x", "access denied"),
        (None, "access denied"),
    ],
)
def test_a_denied_look_at_a_file_is_explained_by_a_listing(flaky, answer, expected):
    denied = "AWS Error ACCESS_DENIED during HeadObject operation: No response body"
    flaky(OSError(denied), OSError(answer) if answer else None)
    with pytest.raises(StorageError, match=expected):
        read_bytes("s3://b/x")


def test_a_store_that_stays_busy_is_given_up_at_the_deadline(flaky, monkeypatch):
    flaky(*[OSError(BUSY)] * 10_000)
    monkeypatch.setattr(storage, "DEADLINE_S", 0.3)
    with pytest.raises(StorageError, match="reduce your rate"):
        read_bytes("s3://b/x")


def test_a_size_that_differs_is_an_error(flaky, tmp_path, monkeypatch):
    handler = flaky()
    monkeypatch.setattr(storage, "DEADLINE_S", 0.2)
    monkeypatch.setattr(
        handler,
        "get_file_info",
        lambda paths: [arrow_fs.FileInfo(p, arrow_fs.FileType.File, size=1) for p in paths],
    )
    with pytest.raises(StorageError, match="stored 1 of 5 bytes"):
        write_bytes("s3://b/x", b"12345")


def test_a_signal_in_the_middle_of_a_write_leaves_a_whole_object_or_none(s3, monkeypatch):
    files, path = filesystem(f"{s3}/manifest.json")

    class Interrupted:
        def open_output_stream(self, path, compression=None):
            stream = files.open_output_stream(path)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
            return stream

        def get_file_info(self, path):
            return files.get_file_info(path)

    monkeypatch.setattr(storage, "filesystem", lambda uri: (Interrupted(), path))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            write_bytes(f"{s3}/manifest.json", b"whole")
    finally:
        signal.signal(signal.SIGINT, before)
    monkeypatch.undo()
    ends = time.monotonic() + 5
    while files.get_file_info(path).type == arrow_fs.FileType.NotFound and time.monotonic() < ends:
        time.sleep(0.05)
    with files.open_input_file(path) as source:
        assert source.read() == b"whole"
