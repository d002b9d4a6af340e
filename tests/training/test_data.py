"""Loading training data: values, classes, layouts, and every error message."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diffusion_ext.training import ImageData, load_data, load_image_array


def write_image(path, colour, size=(6, 4), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


def save(path, array):
    np.save(path, array)
    return path


def test_digits():
    pytest.importorskip("sklearn")
    data = load_data("digits")
    assert data.images.shape == (1797, 1, 8, 8)
    assert data.images.dtype == torch.float32
    assert (data.images.min(), data.images.max()) == (-1, 1)
    assert data.class_names == tuple("0123456789")
    assert data.contexts.sum(0).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert data.contexts[:3].argmax(1).tolist() == [0, 1, 2]  # the set begins 0, 1, 2, ...
    # The first digit's first row of pixels, 0..16 in the set.
    torch.testing.assert_close(
        data.images[0, 0, 0] * 8 + 8, torch.tensor([0.0, 0, 5, 13, 9, 1, 0, 0])
    )


def test_folder_of_classes(tmp_path):
    write_image(tmp_path / "dogs" / "a.png", (255, 0, 0))
    write_image(tmp_path / "dogs" / "b.PNG", (0, 255, 0))
    write_image(tmp_path / "cats" / "c.bmp", (0, 0, 255), size=(20, 10))
    (tmp_path / "cats" / "notes.txt").write_text("not an image")
    (tmp_path / ".cache").mkdir()
    data = load_data(tmp_path, size=8)
    assert data.images.shape == (3, 3, 8, 8)
    assert data.class_names == ("cats", "dogs")
    assert data.contexts.tolist() == [[1, 0], [0, 1], [0, 1]]
    assert data.images[:, :, 0, 0].tolist() == [[-1, -1, 1], [1, -1, -1], [-1, 1, -1]]


def test_folder_without_classes_is_grey_where_its_images_are(tmp_path):
    write_image(tmp_path / "a.png", 255, mode="L")
    write_image(tmp_path / "b.png", 0, mode="L")
    data = load_data(tmp_path, size=4)
    assert data.images.shape == (2, 1, 4, 4)
    assert data.images[:, 0, 0, 0].tolist() == [1, -1]
    assert data.class_names == ()
    assert data.contexts.tolist() == [[0], [0]]


def test_folder_images_are_cropped_to_the_central_square(tmp_path):
    picture = Image.new("L", (12, 4), 0)
    picture.paste(255, (4, 0, 8, 4))
    picture.save(tmp_path / "wide.png")
    assert load_data(tmp_path, size=4).images.tolist() == [[[[1.0] * 4] * 4]]


@given(
    channels=st.sampled_from([1, 3, 4]),
    size=st.integers(5, 12),
    count=st.integers(1, 4),
    declared=st.booleans(),
)
def test_array_layouts_agree(tmp_path_factory, channels, size, count, declared):
    folder = tmp_path_factory.mktemp("arrays")
    pixels = np.random.default_rng(0).integers(0, 256, (count, channels, size, size), np.uint8)
    nchw = save(folder / "nchw.npy", pixels)
    nhwc = save(folder / "nhwc.npy", np.moveaxis(pixels, 1, 3))
    first = load_image_array(nchw, layout="NCHW" if declared else "auto")
    second = load_image_array(nhwc, layout="NHWC" if declared else "auto")
    assert torch.equal(first.images, second.images)
    expected = torch.from_numpy(pixels).double() / 255 * 2 - 1
    torch.testing.assert_close(first.images.double(), expected, rtol=0, atol=1e-6)


def test_grey_array_and_labels_in_a_file_of_their_own(tmp_path):
    images = save(tmp_path / "x.npy", np.linspace(-1, 1, 2 * 16).reshape(2, 4, 4))
    data = load_data(images, labels=save(tmp_path / "y.npy", np.array([2, 0])))
    assert data.images.shape == (2, 1, 4, 4)
    assert (data.images[0, 0, 0, 0], data.images[1, 0, 3, 3]) == (-1, 1)
    assert data.contexts.tolist() == [[0, 0, 1], [1, 0, 0]]


def test_npz_with_context_vectors(tmp_path):
    path = tmp_path / "set.npz"
    np.savez(path, images=np.zeros((2, 8, 8, 3), np.uint8), labels=[[0.5, 0.0], [0.0, 1.0]])
    data = load_data(path)
    assert data.images.shape == (2, 3, 8, 8)
    assert data.contexts.tolist() == [[0.5, 0], [0, 1]]


@pytest.mark.parametrize(
    ("array", "layout", "message"),
    [
        (np.zeros((2, 3, 3, 3), np.uint8), "auto", "layout: wanted 'NHWC' or 'NCHW' .* got 'auto'"),
        (np.zeros((2, 8, 6, 3), np.uint8), "auto", "layout: wanted 'NHWC' or 'NCHW' .* got 'auto'"),
        (np.zeros((2, 8, 6, 3), np.uint8), "NHWC", r"images: wanted shape \[N, C, S, S\], got"),
        (np.zeros((2, 8, 6), np.uint8), "auto", r"images: wanted shape .* got \[2, 1, 8, 6\]"),
        (np.zeros((8, 8), np.uint8), "auto", r"wanted an array \[N, S, S\].*got \(8, 8\)"),
        (np.zeros((2, 8, 8), np.int64), "auto", r"range: int64 values from 0 to 0 do not tell"),
        (np.full((2, 8, 8), 2.0), "auto", r"range: float64 values from 2 to 2 do not tell"),
        (np.full((2, 8, 8), np.nan), "auto", r"range: wanted numbers, got NaN"),
        (np.zeros((2, 8, 8), "c8"), "auto", r"data: wanted real numbers, got complex64"),
        (np.full((2, 8, 8), "a"), "auto", r"data: wanted numbers, got an array of <U1"),
        (np.zeros((0, 8, 8)), "auto", r"images: wanted at least one image"),
        (
            np.zeros((2, 8, 8)),
            "CHWN",
            r"layout: wanted one of \('NCHW', .*, got 'CHWN'; did you mean NCHW\?",
        ),
    ],
)
def test_bad_arrays(tmp_path, array, layout, message):
    with pytest.raises(ValueError, match=message):
        load_data(save(tmp_path / "x.npy", array), layout=layout)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros(3, int), r"labels: wanted labels \[2\] or vectors \[2, n_cfeat\].*\[3\]"),
        (np.zeros((3, 2, 2)), r"labels: wanted labels .* got shape \[3, 2, 2\]"),
        (np.array([0, -1]), r"labels: wanted labels 0, 1, \.\.\., got torch.int64"),
        (np.array([0.5, 1.0]), r"labels: wanted labels 0, 1, \.\.\., got torch.float64"),
    ],
)
def test_bad_labels(tmp_path, labels, message):
    images = save(tmp_path / "x.npy", np.zeros((2, 4, 4)))
    with pytest.raises(ValueError, match=message):
        load_data(images, labels=save(tmp_path / "y.npy", labels))


def test_class_names_must_fit():
    with pytest.raises(ValueError, match=r"class_names: wanted 2 names, .*, got 1"):
        ImageData(torch.zeros(2, 1, 4, 4), torch.eye(2), ("only",))


def test_bad_folders(tmp_path):
    with pytest.raises(ValueError, match=f"data: no images in {re.escape(str(tmp_path))}"):
        load_data(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"data: no images in .*empty"):
        load_data(tmp_path)
    write_image(tmp_path / "stray.png", 0, mode="L")
    with pytest.raises(ValueError, match="has images beside its class folders"):
        load_data(tmp_path)


def test_unreadable_files(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    with pytest.raises(ValueError, match=r"data: cannot read the image .*broken\.png"):
        load_data(tmp_path)
    (tmp_path / "broken.npy").write_bytes(b"no array")
    with pytest.raises(ValueError, match=r"data: cannot read the array .*broken\.npy"):
        load_data(tmp_path / "broken.npy")
    np.savez(tmp_path / "other.npz", pixels=np.zeros(1))
    with pytest.raises(ValueError, match=r"wanted an array `images` in .*got \['pixels'\]"):
        load_data(tmp_path / "other.npz")
    np.savez(tmp_path / "near.npz", label=np.zeros(1), image=np.zeros(1))
    with pytest.raises(ValueError, match=r"got \['image', 'label'\]; did you mean images\?$"):
        load_data(tmp_path / "near.npz")


def test_missing_and_unknown_sources(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data: no file or folder .*nowhere"):
        load_data(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"data: no file .*nowhere\.npy"):
        load_data(tmp_path / "nowhere.npy")
    (tmp_path / "photos").mkdir()
    (tmp_path / "set.npy").touch()
    for wrong, meant in (("phtos", "photos"), ("sets.npy", "set.npy")):
        with pytest.raises(FileNotFoundError, match=rf"; did you mean .*/{meant}\?$"):
            load_data(tmp_path / wrong)
    with pytest.raises(FileNotFoundError, match=r"; did you mean emoji\?$"):
        load_data("emojis")
    (tmp_path / "set.csv").write_text("1,2")
    with pytest.raises(ValueError, match=r'data: wanted "digits", "emoji", a folder, .npy or .npz'):
        load_data(tmp_path / "set.csv")
