import hashlib
import io

import numpy as np
import pandas as pd
import pytest
import tifffile
import torch
from safetensors.torch import save as save_safetensors
from scipy.ndimage import gaussian_filter

from cp2image.errors import ColumnError, EvaluationError, PatchError
from cp2image.metrics.embedding import (
    CellProfilerEmbedding,
    FilterBank,
    InceptionEmbedding,
    quantise,
)
from cp2image.metrics.frechet import Moments, frechet_distance, kernel_distance
from cp2image.metrics.inception import InceptionV3, resize_tf1

GOLDEN_COLUMNS = [0, 500, 1000, 1500, 2047]
GOLDEN = [
    [0.621043, 1.563859, 0.006733365, 0.001519242, 3.892889],
    [0.6361692, 1.573664, 0.002522029, 0.001756857, 3.924369],
]
"""Pool features of torch-fidelity 0.4.0's FID network for `made_up_weights` and `noise_images`."""


_35 = "1x1 5x5_1 5x5_2 3x3dbl_1 3x3dbl_2 3x3dbl_3 _pool"
_17 = "1x1 7x7_1 7x7_2 7x7_3 7x7dbl_1 7x7dbl_2 7x7dbl_3 7x7dbl_4 7x7dbl_5 _pool"
_8 = "1x1 3x3_1 3x3_2a 3x3_2b 3x3dbl_1 3x3dbl_2 3x3dbl_3a 3x3dbl_3b _pool"
BRANCHES = {
    **{f"Mixed_5{letter}": _35 for letter in "bcd"},
    "Mixed_6a": "3x3 3x3dbl_1 3x3dbl_2 3x3dbl_3",
    **{f"Mixed_6{letter}": _17 for letter in "bcde"},
    "Mixed_7a": "3x3_1 3x3_2 7x7x3_1 7x7x3_2 7x7x3_3 7x7x3_4",
    **{f"Mixed_7{letter}": _8 for letter in "bc"},
}
"""The blocks of pt_inception-2015-12-05 and their branches."""


def published_names():
    """Return the 566 names of pt_inception-2015-12-05's state dict."""
    stem = ["1a_3x3", "2a_3x3", "2b_3x3", "3b_1x1", "4a_3x3"]
    layers = [f"Conv2d_{name}" for name in stem]
    for block, branches in BRANCHES.items():
        layers += [f"{block}.branch{name}" for name in branches.split()]
    kept = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = {"fc.weight", "fc.bias"}
    for layer in layers:
        names |= {f"{layer}.conv.weight", *(f"{layer}.bn.{name}" for name in kept)}
    return names


def made_up_weights():
    """Every entry of the state dict from one stream of numbers, in the order of the names."""
    rng = np.random.default_rng(2015)
    state = {}
    for name, tensor in sorted(InceptionV3().state_dict().items()):
        noise = rng.standard_normal(tuple(tensor.shape), dtype=np.float32)
        if name.endswith("conv.weight"):
            noise *= np.sqrt(2 / tensor[0].numel())
        elif name.endswith("tracked"):
            noise = np.zeros((), dtype=np.int64)
        else:
            noise = noise / 10 + name.endswith(("bn.weight", "var"))
        state[name] = torch.from_numpy(np.asarray(noise, dtype=tensor.numpy().dtype))
    return state


def noise_images():
    return np.random.default_rng(68).integers(0, 256, (2, 3, 68, 68), dtype=np.uint8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(made_up_weights(), path)
    return path


@pytest.fixture(scope="module")
def inception(weights):
    return InceptionEmbedding(str(weights))


def test_inception_equals_torch_fidelity_on_the_same_weights(inception):
    found = inception.embed(noise_images())
    assert found.shape == (2, 2048)
    np.testing.assert_allclose(found[:, GOLDEN_COLUMNS], GOLDEN, rtol=1e-4)


def test_inception_has_the_published_names_shapes_and_parameters():
    network = InceptionV3()
    state = network.state_dict()
    assert len(state) == len(published_names()) == 566
    assert set(state) == published_names()
    assert sum(p.numel() for p in network.parameters()) == 23_834_568 + 8 * 2049
    assert tuple(state["Conv2d_1a_3x3.conv.weight"].shape) == (32, 3, 3, 3)
    assert tuple(state["Mixed_6c.branch7x7dbl_5.conv.weight"].shape) == (192, 160, 1, 7)
    assert tuple(state["Mixed_7a.branch7x7x3_3.bn.running_var"].shape) == (192,)
    assert tuple(state["Mixed_7c.branch3x3dbl_3b.conv.weight"].shape) == (384, 384, 3, 1)
    assert tuple(state["fc.weight"].shape) == (1008, 2048)


def test_inception_pools_leave_the_padding_out_and_the_last_takes_the_maximum():
    network, ones = InceptionV3(), torch.ones(1, 1, 5, 5)
    spike = torch.zeros(1, 1, 5, 5)
    spike[..., 2, 2] = 9
    assert torch.equal(network.Mixed_7b.pool(ones), ones)
    assert network.Mixed_7b.pool(spike).max() == 1
    assert network.Mixed_7c.pool(spike).sum() == 81


def test_safetensors_and_state_dict_load_alike_and_the_hash_is_in_the_protocol(
    inception, weights, tmp_path
):
    other = tmp_path / "inception.safetensors"
    other.write_bytes(save_safetensors(made_up_weights()))
    same = InceptionEmbedding(str(other))
    np.testing.assert_array_equal(same.embed(noise_images()), inception.embed(noise_images()))
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert inception.protocol["weights_sha256"] == digest
    assert inception.protocol["dimension"] == inception.dimension == 2048


def test_a_single_stain_is_repeated_and_other_channels_are_picked_in_order(inception, weights):
    images = noise_images()
    dna = InceptionEmbedding(str(weights), channels=(0, 0, 0)).embed(images[:, :1])
    np.testing.assert_array_equal(dna, inception.embed(np.repeat(images[:, :1], 3, axis=1)))
    turned = InceptionEmbedding(str(weights), channels=(2, 1, 0)).embed(images)
    np.testing.assert_array_equal(turned, inception.embed(images[:, ::-1]))
    with pytest.raises(PatchError, match=r"channels \(0, 1, 2\).*patches have 1"):
        inception.embed(images[:, :1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("Mixed_5b.branch1x1.bn.bias"), "1 missing: Mixed_5b.branch1x1"),
        (lambda s: s.update({"AuxLogits.fc.bias": torch.ones(1)}), "1 unexpected: AuxLogits"),
        (
            lambda s: s.update({"fc.weight": torch.ones(1000, 2048)}),
            r"1 of another shape: fc.weight is \(1000, 2048\), expected \(1008, 2048\)",
        ),
    ],
    ids=["missing", "unexpected", "misshapen"],
)
def test_any_other_state_dict_is_refused_naming_what_differs(tmp_path, change, message):
    state = made_up_weights()
    change(state)
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(EvaluationError, match=message):
        InceptionEmbedding(str(tmp_path / "other.pth"))


class Trap:
    """Unpickling this would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_file_that_is_no_state_dict_is_refused_and_not_executed(tmp_path):
    buffer = io.BytesIO()
    torch.save({"a": Trap(tmp_path / "executed")}, buffer)
    for name, content in (
        ("pickle.pth", buffer.getvalue()),
        ("pointer.pth", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        ("empty.pth", b""),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(EvaluationError, match=f"{name}.*neither safetensors nor"):
            InceptionEmbedding(str(tmp_path / name))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("size", [(5, 7), (68, 68), (400, 299)])
def test_resize_reads_where_tensorflow_1_reads(size):
    image = np.random.default_rng(0).uniform(0, 255, size)
    found = resize_tf1(torch.from_numpy(image).float()[None, None], 299)[0, 0].numpy()
    for i, j in ((0, 0), (298, 298), (17, 150), (150, 17), (298, 3)):
        y, x = i * size[0] / 299, j * size[1] / 299
        top, left = int(y), int(x)
        bottom, right = min(top + 1, size[0] - 1), min(left + 1, size[1] - 1)
        above = image[top, left] * (1 - x + left) + image[top, right] * (x - left)
        below = image[bottom, left] * (1 - x + left) + image[bottom, right] * (x - left)
        assert found[i, j] == pytest.approx(above * (1 - y + top) + below * (y - top), abs=0.02)


def test_quantise_agrees_between_types_clamps_and_rounds():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    np.testing.assert_array_equal(quantise(levels), levels)
    np.testing.assert_array_equal(quantise(levels.astype(np.uint16) * 257), levels)
    np.testing.assert_array_equal(quantise(levels.astype(np.float32) / 255), levels)
    assert quantise(np.array([[[[-0.3, 1.2, 0.5, 0.0]]]])).tolist() == [[[[0, 255, 128, 0]]]]


@pytest.mark.parametrize(
    ("patches", "message"),
    [
        (np.zeros((3, 8, 8)), r"shape \(3, 8, 8\)"),
        (np.zeros((1, 1, 8, 8), dtype=np.int64), "int64"),
        (np.full((1, 1, 8, 8), np.nan), "NaN"),
        (np.full((1, 1, 8, 8), 200.0), "reach 200"),
    ],
)
def test_patches_that_are_no_patches_are_refused(patches, message):
    with pytest.raises(PatchError, match=message):
        quantise(patches)


@pytest.mark.parametrize(("channels", "dimension"), [(1, 38), (3, 129), (5, 240)])
def test_filter_bank_takes_any_number_of_channels(channels, dimension):
    x = np.random.default_rng(0).uniform(size=(3, channels, 40, 52))
    bank = FilterBank(channels, batch=2)
    found = bank.embed(x)
    assert found.shape == (3, dimension) == (3, bank.dimension)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[2:], FilterBank(channels).embed(x[2:]), atol=1e-5)
    with pytest.raises(PatchError, match=f"1 channels, the filter bank {channels + 1}"):
        FilterBank(channels + 1).embed(x[:, :1])


def test_filter_bank_answers_to_the_orientation_and_scale_of_a_grating():
    y, x = np.mgrid[:64, :64]
    for index, angle in enumerate(np.pi * np.arange(4) / 4):
        wave = 0.5 + 0.4 * np.cos(2 * np.pi / 8 * (x * np.cos(angle) + y * np.sin(angle)))
        found = FilterBank(1).embed(wave[None, None])[0]
        whole = np.delete(found, [0, 1])  # after the two means: 8 moduli and a ratio per level
        levels = np.stack([whole[9 * k : 9 * k + 8].reshape(4, 2) for k in range(4)])
        assert np.unravel_index(levels[..., 0].argmax(), (4, 4)) == (1, index)


@pytest.fixture(scope="module")
def real_cells(shared_data):
    index = pd.read_csv(shared_data / "bbbc021/cells.csv").query("plate == 'Week4_27861'")
    files = sorted(set(index["file"]))[:6]
    cells = np.concatenate([tifffile.imread(shared_data / "bbbc021" / name) for name in files])
    cells = cells[np.random.default_rng(0).permutation(len(cells))[:700]]
    return cells / cells.max(axis=(2, 3), keepdims=True).clip(1).astype(np.float32)


@pytest.mark.real_data
def test_filter_bank_distance_grows_with_every_kind_of_damage_to_real_cells(real_cells):
    rng = np.random.default_rng(0)
    order = rng.permutation(len(real_cells))
    half = len(order) // 2
    a, b = real_cells[order[:half]], real_cells[order[half : 2 * half]]
    bank = FilterBank(3)
    reference = bank.embed(a)

    def score(cells):
        embedded = bank.embed(cells)
        distance = frechet_distance(Moments.of(reference), Moments.of(embedded))
        return distance, kernel_distance(reference, embedded).mean

    floor = score(b)
    damaged = {
        "blur": gaussian_filter(b, (0, 0, 1, 1)),
        "more blur": gaussian_filter(b, (0, 0, 2, 2)),
        "noise": np.clip(b + rng.normal(0, 0.05, b.shape), 0, 1),
        "mean image": np.repeat(b.mean(axis=0, keepdims=True), half, axis=0),
        "ten cells only": b[rng.integers(10, size=half)],
        "channels swapped": b[:, [0, 2, 1]],
    }
    scores = {name: score(cells) for name, cells in damaged.items()}
    assert all(distance > 3 * floor[0] for distance, _ in scores.values())
    assert all(kernel > floor[1] + 0.2 for _, kernel in scores.values())
    assert scores["more blur"] > scores["blur"]
    assert abs(floor[1]) < 0.3


@pytest.fixture
def features():
    rng = np.random.default_rng(0)
    n, latent = 500, rng.normal(size=(500, 4))
    columns = {
        f"Nuclei_Texture_Contrast_DNA_{k}_00_256": latent @ rng.normal(size=4) * 10**k + 5
        for k in range(12)
    }
    columns["Cells_AreaShape_Orientation"] = rng.uniform(-90, 90, n)
    columns["Cells_AreaShape_EulerNumber"] = np.where(rng.uniform(size=n) < 0.1, 0.0, 1.0)
    columns["Cells_AreaShape_Area"] = np.full(n, 300.0)
    columns["Cells_AreaShape_Solidity"] = np.where(rng.uniform(size=n) < 0.2, np.nan, 1.0)
    columns["Cells_AreaShape_Center_X"] = rng.uniform(size=n)
    return pd.DataFrame({"Metadata_Well": "A01"} | columns)


def test_cp_embedding_drops_what_does_not_vary_and_says_its_dimension(features):
    embedding = CellProfilerEmbedding.fit(features, dimensions=6)
    assert embedding.protocol["features"] == 12 + 2 + 1
    found = embedding.embed(features)
    assert found.shape == (500, 6) == (500, embedding.dimension)
    covariance = np.cov(found, rowvar=False)
    np.testing.assert_allclose(covariance, np.diag(np.diag(covariance)), atol=1e-4)
    assert (np.diff(np.diag(covariance)) <= 1e-6).all()
    everything = CellProfilerEmbedding.fit(features).embed(features)
    assert covariance.trace() > 0.9 * np.cov(everything, rowvar=False).trace()


def test_cp_embedding_with_all_axes_keeps_the_distances_of_robust_z_scores(features):
    names = [name for name in features if "Texture" in name]
    z = features[names].to_numpy()
    z = (z - np.median(z, axis=0)) / (1.4826 * np.median(np.abs(z - np.median(z, axis=0)), axis=0))
    z = np.clip(z, -5, 5)
    for rows in (500, 9):
        embedding = CellProfilerEmbedding.fit(features[names])
        found = embedding.embed(features[names][:rows])
        expected = np.linalg.norm(z[0] - z[1:rows], axis=1)
        np.testing.assert_allclose(
            np.linalg.norm(found[0] - found[1:], axis=1), expected, rtol=1e-3
        )


def test_cp_embedding_takes_missing_and_extreme_values_of_the_generated_set(features):
    embedding = CellProfilerEmbedding.fit(features)
    strange = features.copy()
    strange.iloc[0, 1:] = np.nan
    strange.iloc[1, 1:] = np.inf
    found = embedding.embed(strange)
    assert np.isfinite(found).all()
    assert np.abs(found).max() < 5 * np.sqrt(15) * 2


def test_cp_embedding_refuses_missing_columns_and_sets_without_variation(features):
    embedding = CellProfilerEmbedding.fit(features)
    with pytest.raises(ColumnError, match="Cells_AreaShape_Orientation"):
        embedding.embed(features.drop(columns="Cells_AreaShape_Orientation"))
    for table in (features[:1], features[:0], features[["Metadata_Well"]]):
        with pytest.raises(EvaluationError, match=r"none of .* measured columns varies"):
            CellProfilerEmbedding.fit(table)
