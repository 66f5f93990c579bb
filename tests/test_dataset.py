import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from cp2image import dataset
from cp2image.data.schema import PatchFormat, build_table, decode_patches, to_parquet
from cp2image.dataset import (
    CellRange,
    Manifest,
    Part,
    manifest_uri,
    open_dataset,
    plate_folder,
    read_range,
)
from cp2image.errors import DatasetError
from cp2image.storage import join, write_bytes

FORMAT = PatchFormat(("DNA", "Actin"), 4, "uint8", 8)


def table_of(plate, objects, features=("Nuclei_AreaShape_Area",)):
    """Cells whose every pixel and feature is their object number."""
    numbers = np.asarray(objects)
    metadata = pd.DataFrame(
        {
            "Metadata_Plate": plate,
            "Metadata_Well": "B02",
            "Metadata_Site": "1",
            "Metadata_ImageNumber": 1,
            "Metadata_ObjectNumber": numbers,
        }
    )
    values = pd.DataFrame({name: numbers.astype(np.float32) for name in features})
    patches = np.broadcast_to(numbers[:, None, None, None], (len(numbers), 2, 4, 4))
    return build_table(metadata, values, patches.astype(np.uint8), FORMAT)


def publish_by_hand(uri, plate, parts, row_group=1024):
    entries = []
    for number, objects in enumerate(parts):
        name = join(plate_folder(plate), f"part-{number:05d}.parquet")
        data = to_parquet(table_of(plate, objects), row_group)
        write_bytes(join(uri, name), data)
        entries.append(Part(name, len(objects), len(data)))
    manifest = Manifest(plate, "mark", tuple(entries), {"in": 99})
    write_bytes(manifest_uri(uri, plate), manifest.to_json())
    return manifest


@pytest.fixture
def dataset_uri(tmp_path):
    uri = str(tmp_path / "cells")
    publish_by_hand(uri, "P2", [range(1, 8), range(8, 11)], row_group=3)
    publish_by_hand(uri, "P1", [range(1, 5)])
    return uri


def test_a_dataset_knows_its_cells_features_and_format(dataset_uri):
    dataset = open_dataset(dataset_uri)
    assert dataset.rows == 14
    assert dataset.features == ["Nuclei_AreaShape_Area"]
    assert dataset.metadata[0] == "Metadata_Plate"
    assert len(dataset.metadata) == 5
    assert dataset.patch_format == FORMAT


@pytest.mark.parametrize("cells", [1, 2, 3, 4, 100])
def test_ranges_of_any_size_hold_every_cell_once_and_in_order(dataset_uri, cells):
    dataset = open_dataset(dataset_uri)
    ranges = dataset.ranges(cells)
    assert max(part.rows for part in ranges) <= cells
    for plate, count in (("P1", 4), ("P2", 10)):
        mine = [part for part in ranges if part.plate == plate]
        assert [part.index for part in mine] == list(range(len(mine)))
        tables = [read_range(part) for part in mine]
        numbers = np.concatenate([table.column("Metadata_ObjectNumber") for table in tables])
        np.testing.assert_array_equal(numbers, np.arange(1, count + 1))
        pixels = np.concatenate([decode_patches(table, FORMAT) for table in tables])
        np.testing.assert_array_equal(pixels[:, 1, 3, 2], np.arange(1, count + 1))


def test_a_plate_asked_for_twice_is_cut_once(dataset_uri):
    dataset = open_dataset(dataset_uri)
    assert dataset.ranges(5, ["P1", "P1"]) == dataset.ranges(5, ["P1"])


def test_an_unknown_plate_is_refused_with_the_nearest_name(dataset_uri):
    with pytest.raises(DatasetError, match=r"no plate 'p2' \(did you mean 'P2'\?\); it has 2"):
        open_dataset(dataset_uri).ranges(5, ["p2"])


def test_only_the_wanted_columns_are_read(dataset_uri):
    dataset = open_dataset(dataset_uri)
    tables = list(dataset.read(["Metadata_Well"], ["P2"]))
    assert [table.column_names for table in tables] == [["Metadata_Well"]] * 2


def test_three_lines_of_pandas_read_a_dataset_and_a_patch(dataset_uri):
    cells = pd.read_parquet(dataset_uri)
    patch = np.frombuffer(cells.patch[0], "uint8").reshape(2, 4, 4)
    assert len(cells) == 14
    assert sorted(cells["plate"].astype(str).unique()) == ["P1", "P2"]
    assert (patch == cells["Metadata_ObjectNumber"][0]).all()


@pytest.mark.parametrize(
    "plate", ["with space", "a/b", "50% H2O", "Zürich-Ä 板", "..", "_x", "p=1&q=2", "%2F"]
)
def test_a_plate_of_any_name_is_published_and_read_back(tmp_path, plate):
    uri = str(tmp_path / "cells")
    publish_by_hand(uri, plate, [range(1, 4)])
    publish_by_hand(uri, "other", [range(1, 3)])
    dataset = open_dataset(uri)
    assert set(dataset.manifests) == {plate, "other"}
    assert sum(part.rows for part in dataset.ranges(2, [plate])) == 3
    assert {path.name for path in (tmp_path / "cells").iterdir()} == {
        "_manifests",
        "plate=other",
        plate_folder(plate),
    }
    cells = pd.read_parquet(uri)
    assert cells.groupby("Metadata_Plate").size().to_dict() == {plate: 3, "other": 2}
    assert set(cells["plate"].astype(str)) == {plate, "other"}


def test_what_is_no_dataset_is_refused_saying_what_is_there(tmp_path):
    with pytest.raises(DatasetError, match="no such folder"):
        open_dataset(str(tmp_path / "nowhere"))
    uri = str(tmp_path / "started")
    write_bytes(join(uri, "plate=P1", "part-00000.parquet"), b"half")
    with pytest.raises(DatasetError, match="no plate in it is finished"):
        open_dataset(uri)


def test_a_dataset_without_a_single_cell_is_refused(tmp_path):
    uri = str(tmp_path / "cells")
    publish_by_hand(uri, "P1", [])
    with pytest.raises(DatasetError, match="every published plate is empty"):
        open_dataset(uri)


def test_files_without_a_manifest_are_not_read(dataset_uri, tmp_path):
    write_bytes(join(dataset_uri, "plate=P3", "part-00000.parquet"), b"half a file")
    write_bytes(join(dataset_uri, "plate=P1", "part-00009.parquet"), b"half a file")
    dataset = open_dataset(dataset_uri)
    assert sum(table.num_rows for table in dataset.read()) == 14


def test_a_manifest_that_is_none_is_named(dataset_uri):
    write_bytes(join(dataset_uri, "_manifests", "P1.json"), b'{"plate": "P1"}')
    with pytest.raises(DatasetError, match=r"P1\.json: not a plate's manifest"):
        open_dataset(dataset_uri)


def test_manifests_of_earlier_versions_without_an_input_are_read():
    manifest = Manifest("P", "f", (Part("plate=P/x", 3, 10),), {"in": 3}, "abc")
    entry = json.loads(manifest.to_json())
    assert Manifest.from_json(json.dumps(entry).encode()) == manifest
    del entry["input"]
    assert Manifest.from_json(json.dumps(entry).encode()).input == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is gone"),
        (b"PAR1 and then nothing that makes sense PAR1", "damaged Parquet"),
        (to_parquet(table_of("P1", range(1, 3))), "2 rows, its manifest says at least 4"),
    ],
    ids=["missing", "damaged", "shorter"],
)
def test_a_published_file_that_was_changed_is_named(dataset_uri, tmp_path, content, message):
    place = tmp_path / "cells" / "plate=P1" / "part-00000.parquet"
    if content is None:
        place.unlink()
    else:
        place.write_bytes(content)
    with pytest.raises(DatasetError, match=message) as caught:
        list(open_dataset(dataset_uri).read())
    assert str(place) in str(caught.value)


def test_a_file_that_was_replaced_is_read_anew(tmp_path):
    uri = str(tmp_path / "cells")
    publish_by_hand(uri, "P", [[1, 2, 3]])
    cells = CellRange("P", 0, join(uri, "plate=P", "part-00000.parquet"), 0, 3)
    assert read_range(cells).column("Metadata_ObjectNumber").to_pylist() == [1, 2, 3]
    publish_by_hand(uri, "P", [[7, 8, 9]])
    assert read_range(cells).column("Metadata_ObjectNumber").to_pylist() == [7, 8, 9]


def test_each_thread_has_its_own_reader(tmp_path):
    place = str(tmp_path / "x.parquet")
    table = pa.table({"value": np.arange(4.0)})
    write_bytes(place, to_parquet(table))
    mine = dataset._parquet(place)
    assert dataset._parquet(place) is mine
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(dataset._parquet, place).result() is not mine
