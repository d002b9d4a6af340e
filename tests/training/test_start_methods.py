"""Worker processes, however Python starts them: by fork, which was Linux's default until 3.14, by
forkserver, which is it now, or anew (spawn), which is that of macOS and Windows."""

import multiprocessing
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import assert_same_run, tiny_trainer

from diffusion_ext.training import TrainingConfig, cached, from_dataset, load_data, map_image_array

CONFIG = TrainingConfig(epochs=1, batch_size=4, samples_every=0)


@pytest.fixture
def start_by():
    """multiprocessing.set_start_method, until the test ends."""
    before = multiprocessing.get_start_method(allow_none=True)
    yield lambda method: multiprocessing.set_start_method(method, force=True)
    multiprocessing.set_start_method(before, force=True)


class Pictures:
    classes = ("dark", "light")

    def __init__(self, change=None):
        self.change = change

    def __len__(self):
        return 6

    def __getitem__(self, index):
        picture = Image.fromarray(np.full((4, 4), 40 * index, np.uint8))
        return (self.change(picture) if self.change else picture), index % 2


def folder(path, workers):
    for index in range(6):
        picture, label = Pictures()[index]
        file = path / "images" / str(label) / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture.save(file)
    return load_data(path / "images", 4, lazy=True, workers=workers)


def cache(path, workers):
    return cached(folder(path, workers), path / "images.npy", progress=False)


def array(path, workers):
    np.save(path / "images.npy", np.stack([np.asarray(Pictures()[i][0]) for i in range(6)]))
    np.save(path / "labels.npy", np.arange(6) % 2)
    labels = path / "labels.npy"
    return load_data(path / "images.npy", labels=labels, lazy=True, workers=workers)


def dataset(path, workers):
    return from_dataset(Pictures(), size=4, workers=workers)


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
@pytest.mark.parametrize("made", [folder, cache, array, dataset])
def test_training_with_workers_is_training_without(tmp_path, start_by, made, method):
    alone = tiny_trainer(tmp_path / "alone", CONFIG, made(tmp_path, 0))
    alone.fit(progress=False)
    start_by(method)
    helped = tiny_trainer(tmp_path / "helped", CONFIG, made(tmp_path, 1))
    helped.fit(progress=False)
    assert_same_run(alone, helped)


@pytest.mark.parametrize("made", [cache, array])
def test_a_mapped_file_is_not_copied_to_the_workers(tmp_path, made):
    source = made(tmp_path, 0).source
    source._pixels = np.lib.format.open_memmap(
        tmp_path / "large.npy", mode="w+", dtype=np.uint8, shape=(10_000, 1, 4, 4)
    )
    sent = pickle.dumps(source)
    assert len(sent) < 5000
    received = pickle.loads(sent)
    assert isinstance(received._pixels, np.memmap)
    assert torch.equal(received.read(3)[0], source.read(3)[0])


def test_an_archive_which_cannot_be_mapped_is_sent_whole(tmp_path):
    pixels = np.arange(96, dtype=np.uint8).reshape(6, 1, 4, 4)
    np.savez(tmp_path / "images.npz", images=pixels)
    source = map_image_array(tmp_path / "images.npz").source
    received = pickle.loads(pickle.dumps(source))
    assert torch.equal(received.read(3)[0], torch.from_numpy(pixels[3]))


@pytest.mark.filterwarnings("ignore:Got pickle error")  # torch's own words on it
def test_what_cannot_be_sent_to_a_worker(start_by):
    data = from_dataset(Pictures(lambda picture: picture), size=4, workers=1)
    start_by("spawn")
    wanted = "data: workers=1 wants images that can be sent to processes, got .*[Pp]ickle"
    with pytest.raises(TypeError, match=f"{wanted}.*; workers=0 reads in this process"):
        next(data.batches([np.arange(6)], torch.device("cpu")))
