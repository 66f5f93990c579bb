import numpy as np
import pandas as pd
import pytest
import tifffile

from cp2image.data.stacks import DEFAULT_COLUMNS, open_stacks, read_stack
from cp2image.errors import ColumnError, PatchError, StorageError, TableError

STACK = np.arange(6 * 3 * 10 * 10, dtype=np.uint16).reshape(6, 3, 10, 10)
HEADER = "file,page_index,plate,well,site,compound,concentration,moa,extra\n"
ROWS = (
    "p/a.tif,0,P2,B02,s1,DMSO,0.0,DMSO,x\n"
    "p/a.tif,4,P2,B02,s1,taxol,0.3,,x\n"
    "p/b.tif,0,007,A01,s1,a,1,m,x\n"
)


def write_index(folder, text=HEADER + ROWS):
    (folder / "cells.csv").write_text(text)
    return str(folder / "cells.csv")


def test_the_index_gives_every_cell_its_identity(tmp_path):
    index = open_stacks(write_index(tmp_path))
    assert list(index.Metadata_Plate) == ["P2", "P2", "007"]
    assert list(index.Metadata_ImageNumber) == [2, 2, 1]
    assert list(index.Metadata_ObjectNumber) == [1, 5, 1]
    assert list(index.page) == [0, 4, 0]
    assert index.file[2] == str(tmp_path / "p" / "b.tif")
    assert index.Metadata_Concentration.dtype == np.float64
    assert "extra" not in index
    assert list(index)[:5] == [
        f"Metadata_{name}" for name in ("Plate", "Well", "Site", "ImageNumber", "ObjectNumber")
    ]


def test_columns_may_have_other_names_and_object_numbers_of_their_own(tmp_path):
    text = "stack,n,barcode,pos,fov,cell\ns3://b/a.tif,0,P1,A01,1,17\n/abs/a.tif,1,P1,A01,1,19\n"
    names = {
        "file": "stack",
        "page": "n",
        "Metadata_Plate": "barcode",
        "Metadata_Well": "pos",
        "Metadata_Site": "fov",
        "Metadata_ObjectNumber": "cell",
    }
    index = open_stacks(write_index(tmp_path, text), names)
    assert list(index.Metadata_ObjectNumber) == [17, 19]
    assert list(index.file) == ["s3://b/a.tif", "/abs/a.tif"]


@pytest.mark.parametrize(
    ("text", "kind", "says"),
    [
        (HEADER, TableError, "no rows"),
        (HEADER.replace("well", "wel") + ROWS, ColumnError, "'well'.*did you mean 'wel'"),
        (
            HEADER + ROWS.replace(",4,", ",four,"),
            ColumnError,
            r"'page_index', line 3: found 'four'",
        ),
        (HEADER + ROWS.replace("0.3", "low"), ColumnError, "'concentration', line 3: found 'low'"),
        (HEADER + ROWS.replace("A01", ""), TableError, "line 4 has no 'well'"),
        (HEADER + ROWS.replace(",4,", ",0,"), TableError, "same page .* lines 2 and 3"),
        (HEADER + ROWS.replace("p/a.tif,4", "p/c.tif,0"), TableError, "same cell"),
        (HEADER + ROWS + "p/a.tif,5,P2,B02,s1,a,1,m,x,too,many\n", TableError, "no readable CSV"),
        ("", TableError, "file is empty"),
    ],
)
def test_a_faulty_index_is_refused_with_line_and_column(text, kind, says, tmp_path):
    with pytest.raises(kind, match=says):
        open_stacks(write_index(tmp_path, text))


def test_a_mapping_without_or_with_unknown_names_is_refused(tmp_path):
    names = {name: column for name, column in DEFAULT_COLUMNS.items() if name != "page"}
    with pytest.raises(ColumnError, match=r"unknown names \['plate'\], missing names \['page'\]"):
        open_stacks(write_index(tmp_path), {**names, "plate": "plate"})


@pytest.mark.parametrize(
    ("stack", "options", "channels"),
    [
        (STACK, {"photometric": "minisblack"}, None),
        (STACK, {"photometric": "minisblack", "planarconfig": "separate"}, None),
        (STACK, {"ome": True, "photometric": "minisblack", "metadata": {"axes": "TCYX"}}, None),
        (STACK, {"photometric": "minisblack", "metadata": None}, 3),
        (np.moveaxis(STACK, 1, -1), {"photometric": "rgb"}, None),
        (np.moveaxis(STACK, 1, -1), {"photometric": "minisblack"}, None),
    ],
    ids=["shaped", "planar", "OME", "bare", "trailing", "trailing shaped"],
)
def test_pages_come_in_the_order_asked_for(stack, options, channels, tmp_path):
    name = str(tmp_path / "stack.tif")
    tifffile.imwrite(name, stack, **options)
    found = read_stack(name, [4, 0], channels)
    np.testing.assert_array_equal(found, STACK[[4, 0]])
    assert found.dtype == np.uint16


def test_one_patch_and_one_channel_keep_their_axes(tmp_path):
    name = str(tmp_path / "stack.tif")
    tifffile.imwrite(name, STACK[:1], photometric="minisblack")
    np.testing.assert_array_equal(read_stack(name, [0], 3), STACK[:1])
    tifffile.imwrite(name, STACK[:, 0], photometric="minisblack")
    np.testing.assert_array_equal(read_stack(name, [5]), STACK[5:, :1])


def test_pages_beyond_the_stack_are_refused(tmp_path):
    name = str(tmp_path / "stack.tif")
    tifffile.imwrite(name, STACK, photometric="minisblack")
    with pytest.raises(PatchError, match=r"stack\.tif: page 6 asked for, the stack holds 6"):
        read_stack(name, [0, 6])
    with pytest.raises(PatchError, match="page -1"):
        read_stack(name, [-1])


@pytest.mark.parametrize(
    ("stack", "says"),
    [
        (STACK[..., :9], r"found axes Q=6, Q=3, Y=10, X=9"),
        (STACK[:, :2], r"with 3 channels"),
        (STACK.astype(np.int32), r"of int32"),
        (STACK[np.newaxis].repeat(2, 0), r"Q=2, Q=6"),
    ],
)
def test_other_shapes_and_types_are_refused(stack, says, tmp_path):
    name = str(tmp_path / "stack.tif")
    tifffile.imwrite(name, stack, photometric="minisblack")
    with pytest.raises(PatchError, match=says):
        read_stack(name, [0], 3)


def test_mixed_types_damage_and_absence_are_refused(tmp_path):
    name = tmp_path / "stack.tif"
    with pytest.raises(StorageError, match=r"stack\.tif: .*not found"):
        read_stack(str(name), [0])
    name.write_bytes(b"no image at all")
    with pytest.raises(PatchError, match="no readable TIFF stack"):
        read_stack(str(name), [0])
    tifffile.imwrite(name, STACK, photometric="minisblack")
    content = name.read_bytes()
    name.write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(PatchError, match=r"truncated|no readable"):
        read_stack(str(name), [0])
    name.write_bytes(content)
    tifffile.imwrite(name, STACK[0, 0].astype(np.uint8), append=True)
    with pytest.raises(PatchError, match="pages of 2 kinds"):
        read_stack(str(name), [0])


@pytest.mark.real_data
def test_every_one_of_the_6049_indexed_cells_is_found_on_its_page(shared_data):
    folder = shared_data / "bbbc021"
    index = open_stacks(str(folder / "cells.csv"))
    assert len(index) == 6049
    assert index.Metadata_ImageNumber.nunique() == 453
    plain = pd.read_csv(folder / "cells.csv")
    np.testing.assert_array_equal(index.page, plain.page_index)
    for uri, rows in list(index.groupby("file"))[::8]:
        patches = read_stack(uri, rows.page, channels=3)
        pages = tifffile.imread(uri).reshape(-1, 3, 68, 68)
        np.testing.assert_array_equal(patches, pages[rows.page])
