"""A simulated screen in BBBC021's own layout, with the truth about every cell. Floor 1: no Ray.

For tests, and for a demonstration that needs no download. What is simulated is said in
`simulated_fields` (layout, treatments, camera) and `simulated_cells` (the cells).
"""

import io
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import tifffile
from numpy.typing import NDArray
from skimage.measure import regionprops_table

from cp2image.data.simulated_cells import CHANNELS
from cp2image.data.simulated_fields import (
    SimulatedField,
    SimulatedScreen,
    simulate_fields,
)
from cp2image.storage import join, write_bytes

__all__ = [
    "SimulatedField",
    "SimulatedFiles",
    "SimulatedScreen",
    "simulate_fields",
    "simulate_screen",
]

_BBBC021_NAMES = {"DNA": "DAPI", "Tubulin": "Tubulin", "Actin": "Actin"}
_SHAPES = {
    "area": "AreaShape_Area",
    "centroid-1": "AreaShape_Center_X",
    "centroid-0": "AreaShape_Center_Y",
    "eccentricity": "AreaShape_Eccentricity",
    "axis_major_length": "AreaShape_MajorAxisLength",
    "axis_minor_length": "AreaShape_MinorAxisLength",
    "orientation": "AreaShape_Orientation",
    "extent": "AreaShape_Extent",
    "equivalent_diameter_area": "AreaShape_EquivalentDiameter",
    "bbox-3": "AreaShape_BoundingBoxMaximum_X",
    "bbox-2": "AreaShape_BoundingBoxMaximum_Y",
    "bbox-1": "AreaShape_BoundingBoxMinimum_X",
    "bbox-0": "AreaShape_BoundingBoxMinimum_Y",
}


@dataclass(frozen=True)
class SimulatedFiles:
    """Where a simulated screen was written, and how much of it there is."""

    images: str
    image_index: str
    moa: str
    tables: str
    truth: str
    fields: int
    cells: int
    defective_fields: int

    def __str__(self) -> str:
        """Return one line for the terminal."""
        return (
            f"{self.cells} simulated cells in {self.fields} fields "
            f"({self.defective_fields} defective) under {self.images}, tables in {self.tables}"
        )


def simulate_screen(folder: str | Path, screen: SimulatedScreen) -> SimulatedFiles:
    """Write a simulated screen: images, BBBC021's two metadata files, CellProfiler tables, truth.

    - ``images/<week>/<plate>/<well>_s<site>_w1<GUID>.tif``: 16 bits, w1 DNA, w2 tubulin, w4 actin.
    - ``BBBC021_v1_image.csv``, one row per field, and ``BBBC021_v1_moa.csv``.
    - ``tables/``: ``Image``, ``Nuclei``, ``Cells`` and ``Cytoplasm.csv`` as ExportToSpreadsheet
      writes them, the features being those of `measure_truth`.
    - ``truth.csv``: one row per cell, what was drawn, and the field's defect.

    ``PathName_*`` is relative to ``images/``. Cells of defective fields are in the tables too.

    Parameters
    ----------
    folder
        Local folder or URI, as `cp2image.storage` takes them.
    screen
        What to simulate.

    Raises
    ------
    ConfigError
        If the screen's cells do not fit into its fields.
    StorageError
        If the folder cannot be written.
    """
    root = str(folder)
    files = SimulatedFiles(
        images=join(root, "images"),
        image_index=join(root, "BBBC021_v1_image.csv"),
        moa=join(root, "BBBC021_v1_moa.csv"),
        tables=join(root, "tables"),
        truth=join(root, "truth.csv"),
        fields=screen.plates * screen.wells_per_plate * screen.sites_per_well,
        cells=0,
        defective_fields=0,
    )
    parts: dict[str, list[pd.DataFrame]] = {}
    defective = 0
    for number, field in enumerate(simulate_fields(screen), start=1):
        for channel, plane in zip(CHANNELS, field.images, strict=True):
            uri = join(files.images, field.folder, field.files[channel])
            write_bytes(uri, _encode_tiff(plane))
        defective += field.defect != "none"
        for name, rows in _list_rows(field, number).items():
            parts.setdefault(name, []).append(rows)
    tables = {name: pd.concat(rows, ignore_index=True) for name, rows in parts.items()}
    for name in ("Nuclei", "Cells", "Cytoplasm", "Image"):
        write_bytes(join(files.tables, f"{name}.csv"), _encode_csv(tables[name]))
    write_bytes(files.truth, _encode_csv(tables["truth"]))
    write_bytes(files.moa, _encode_csv(tables["moa"].drop_duplicates()))
    write_bytes(files.image_index, _encode_csv(tables["index"]))
    return replace(files, cells=len(tables["truth"]), defective_fields=defective)


def measure_truth(field: SimulatedField) -> dict[str, pd.DataFrame]:
    """Measure the true masks of a field on its noise-free light, under CellProfiler's names.

    Returns
    -------
    ``Nuclei``, ``Cells`` and ``Cytoplasm`` (cell minus nucleus), one row per cell in the order of
    ``field.cells``. Shapes as MeasureObjectSizeShape (scikit-image's region properties, orientation
    in degrees), intensities as MeasureObjectIntensity (share of the 16-bit range). NaN where a
    cytoplasm has no pixel.
    """
    return {
        "Nuclei": _measure_objects(field.nuclei, field),
        "Cells": _measure_objects(field.cell_bodies, field),
        "Cytoplasm": _measure_objects(np.where(field.nuclei > 0, 0, field.cell_bodies), field),
    }


def _measure_objects(labels: NDArray[np.int32], field: SimulatedField) -> pd.DataFrame:
    count = len(field.cells)
    properties = {name.split("-")[0] for name in _SHAPES}
    shapes = pd.DataFrame(regionprops_table(labels, properties=sorted(properties)))
    shapes.index = pd.Index(np.unique(labels[labels > 0]))
    table = shapes.reindex(np.arange(1, count + 1)).rename(columns=_SHAPES)[[*_SHAPES.values()]]
    table["AreaShape_Area"] = table["AreaShape_Area"].fillna(0.0)
    table["AreaShape_Orientation"] = np.rad2deg(table["AreaShape_Orientation"])
    table["Location_Center_X"] = table["AreaShape_Center_X"]
    table["Location_Center_Y"] = table["AreaShape_Center_Y"]
    area = table["AreaShape_Area"].replace(0.0, np.nan).to_numpy()
    flat = labels.ravel()
    for channel, plane in zip(CHANNELS, field.expected, strict=True):
        light = plane.ravel().astype(np.float64) * (16 / 65535)
        total = np.bincount(flat, light, count + 1)[1:]
        squares = np.bincount(flat, light**2, count + 1)[1:]
        mean = total / area
        table[f"Intensity_IntegratedIntensity_{channel}"] = total
        table[f"Intensity_MeanIntensity_{channel}"] = mean
        table[f"Intensity_StdIntensity_{channel}"] = np.sqrt(
            np.maximum(squares / area - mean**2, 0.0)
        )
    return table.reset_index(drop=True)


def _list_rows(field: SimulatedField, image_number: int) -> dict[str, pd.DataFrame]:
    """Return one field's part of every table, by the table's name."""
    treatment = field.treatment
    objects = pd.DataFrame(
        {"ImageNumber": image_number, "ObjectNumber": np.arange(1, len(field.cells) + 1)}
    )
    metadata = {
        "Metadata_Plate": field.plate,
        "Metadata_Well": field.well,
        "Metadata_Site": field.site,
        "Metadata_Replicate": field.replicate,
        "Metadata_Compound": treatment.compound,
        "Metadata_Concentration": treatment.concentration,
        "Metadata_MOA": treatment.moa,
    }
    rows = {
        name: pd.concat([objects, table], axis=1) for name, table in measure_truth(field).items()
    }
    rows["Cells"]["Parent_Nuclei"] = objects["ObjectNumber"]
    rows["Cytoplasm"]["Parent_Nuclei"] = objects["ObjectNumber"]
    rows["Cytoplasm"]["Parent_Cells"] = objects["ObjectNumber"]
    image: dict[str, object] = {"ImageNumber": image_number}
    image |= {f"FileName_{channel}": field.files[channel] for channel in CHANNELS}
    image |= {f"PathName_{channel}": field.folder for channel in CHANNELS}
    image |= {f"Height_{channel}": field.images.shape[1] for channel in CHANNELS}
    image |= {f"Width_{channel}": field.images.shape[2] for channel in CHANNELS}
    image |= {f"Count_{name}": len(objects) for name in ("Nuclei", "Cells", "Cytoplasm")}
    rows["Image"] = pd.DataFrame([image | metadata])
    index: dict[str, object] = {"TableNumber": 1, "ImageNumber": image_number}
    for channel, name in _BBBC021_NAMES.items():
        index[f"Image_FileName_{name}"] = field.files[channel]
        index[f"Image_PathName_{name}"] = field.folder
    index |= {
        "Image_Metadata_Plate_DAPI": field.plate,
        "Image_Metadata_Well_DAPI": field.well,
        "Replicate": field.replicate,
        "Image_Metadata_Compound": treatment.compound,
        "Image_Metadata_Concentration": treatment.concentration,
    }
    rows["index"] = pd.DataFrame([index])
    rows["moa"] = pd.DataFrame(
        {
            "compound": [treatment.compound],
            "concentration": [treatment.concentration],
            "moa": [treatment.moa],
        }
    )
    drawn = pd.DataFrame([metadata | {"defect": field.defect}] * len(objects))
    rows["truth"] = pd.concat([objects, drawn, field.cells], axis=1)
    return rows


def _encode_csv(table: pd.DataFrame) -> bytes:
    return table.to_csv(index=False, lineterminator="\n").encode()


def _encode_tiff(plane: NDArray[np.uint16]) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, plane, photometric="minisblack", metadata=None, software=False)
    return buffer.getvalue()
