"""The measures of a run's quality, against what they are by definition."""

import sys
import types

import numpy as np
import pytest
import torch

from diffusion_ext.checks import counted
from diffusion_ext.training import load_digits
from diffusion_ext.training.evaluation import (
    RealImages,
    evaluate,
    features,
    frechet_distance,
    inception,
    nearest,
    precision_recall,
    train_judge,
)
from diffusion_ext.training.evaluation.inception import inception_distance


def test_the_frechet_distance_of_normals_is_known():
    """Of N(μ, diag s²): |μ₁-μ₂|² + Σ (s₁-s₂)²; a rotation of both changes nothing."""
    generator = torch.Generator().manual_seed(0)
    z1, z2 = (torch.randn(200_000, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    s1, s2, shift = torch.tensor([1.0, 2, 3]), torch.tensor([2.0, 2, 1]), torch.tensor([1.0, 0, -2])
    first, second = z1 * s1, z2 * s2 + shift
    exact = (shift.square().sum() + (s1 - s2).square().sum()).item()
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64)).Q
    assert frechet_distance(first, second) == pytest.approx(exact, rel=0.01)
    turned = frechet_distance(first @ rotation, second @ rotation)
    assert turned == pytest.approx(frechet_distance(first, second), rel=1e-9)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-6)


def test_the_frechet_distance_is_scipys():
    """Of covariances that do not commute, and of fewer rows than features."""
    linalg = pytest.importorskip("scipy.linalg")
    random = np.random.default_rng(0)
    for rows in (500, 5):
        a, b = (random.normal(size=(rows, 8)) @ random.normal(size=(8, 8)) for _ in range(2))
        c1, c2 = np.cov(a.T), np.cov(b.T)
        root = linalg.sqrtm(c1 @ c2).real
        exact = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(c1 + c2 - 2 * root)
        ours = frechet_distance(torch.from_numpy(a), torch.from_numpy(b))
        assert ours == pytest.approx(exact, rel=1e-4)


def test_precision_and_recall_of_points_on_a_line():
    real = torch.arange(10.0)[:, None]  # each reaches to its third neighbour: 2, at the ends 3
    inside, far = torch.tensor([[4.5], [0.5], [-2.9]]), torch.tensor([[100.0], [-3.1]])
    made = torch.cat([inside, far, far + 1000])
    assert precision_recall(made, real)[0] == pytest.approx(3 / 7)
    same = precision_recall(real, real)
    assert same == (1.0, 1.0)
    half = torch.linspace(0, 4, 50)[:, None]  # close together: they reach hardly beyond 4
    precision, recall = precision_recall(half, real)
    assert precision == 1
    assert recall == pytest.approx(0.5)
    with pytest.raises(ValueError, match="features: wanted five and more, got 4 and 10"):
        precision_recall(real[:4], real)


def test_the_nearest_image():
    others = torch.stack([torch.full((1, 2, 2), v) for v in (-1.0, 0.0, 0.75)])
    images = torch.stack([torch.full((1, 2, 2), v) for v in (0.5, -0.9)])
    found = nearest(images, others)
    assert found.index.tolist() == [2, 0]
    torch.testing.assert_close(found.distance, torch.tensor([0.25, 0.1], dtype=torch.float64))


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("sklearn")
    data = load_digits()
    return data.images, data.contexts.argmax(1)


@pytest.fixture(scope="module")
def real(digits):
    return RealImages.without_split(*digits)


@pytest.fixture(scope="module")
def judge(real):
    return train_judge(real)


def test_real_images_are_as_good_as_real_images(real, judge):
    found = evaluate(real.held_out, real.held_out_labels, real, judge)
    assert found.recognised == found.classifier_accuracy > 0.95
    assert found.frechet == found.frechet_real
    assert (found.precision, found.recall) == (found.precision_real, found.recall_real)
    assert found.precision > 0.8
    assert found.nearest_median == 0  # the run has seen them, since it held out none
    assert found.copies is None


def test_noise_copies_and_wrong_classes_are_told(real, judge):
    split = RealImages(real.trained, real.held_out, real.trained_labels, real.held_out_labels)
    noise = torch.rand(300, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    labels = torch.arange(300) % 10
    of_noise = evaluate(noise, labels, split, judge)
    assert of_noise.recognised < 0.3
    assert of_noise.frechet > 5 * of_noise.frechet_real
    assert of_noise.precision < 0.3
    assert of_noise.copies == 0
    copies = evaluate(real.trained[:300], (real.trained_labels[:300] + 1) % 10, split, judge)
    assert copies.recognised < 0.05
    assert copies.copies == 1
    assert copies.nearest.index.tolist() == list(range(300))


def test_one_class_alone_has_precision_and_no_recall(real, judge):
    ones = real.trained[real.trained_labels == 1]
    found = evaluate(ones, torch.ones(len(ones), dtype=torch.int64), real, judge)
    assert found.precision > 0.9
    assert found.recall < 0.35


def test_without_labels_the_features_are_of_rotations(real, monkeypatch):
    monkeypatch.setattr(features, "STEPS", 150)
    plain = RealImages(real.trained, real.held_out)
    judge = train_judge(plain)
    assert not judge.of_classes
    assert judge.accuracy > 0.7
    assert judge.features(real.held_out).shape == (len(real.held_out), 64)
    again = train_judge(plain)
    assert torch.equal(judge.features(real.held_out), again.features(real.held_out))
    found = evaluate(real.held_out, None, plain, judge)
    assert (found.recognised, found.classifier_accuracy) == (None, None)


@pytest.mark.parametrize("count", [1, 2, 3, 12, 40])
@pytest.mark.parametrize("labelled", [False, True])
def test_few_images_are_measured_as_far_as_that_goes(monkeypatch, count, labelled):
    """And what is not measured, or is a rough figure, is said."""
    monkeypatch.setattr(features, "STEPS", 5)
    images = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    labels = torch.arange(count) % 2 if labelled else None
    real = RealImages.without_split(images, labels)
    held = round(0.2 * count)
    assert (len(real.trained), len(real.held_out)) == (count - held, held)
    found = evaluate(images, labels, real, train_judge(real))
    told = " | ".join(found.remarks)
    assert found.nearest_median == 0
    assert (found.nearest_median_real is None) == (held == 0)
    assert (found.recognised is None) == (not labelled)
    assert (found.classifier_accuracy is None) == (not labelled or held == 0)
    assert (found.frechet is None) == (count - held < 2)
    assert (found.frechet_real is None) == (held < 2)
    assert ("no Fréchet distance of real images: " in told) == (held < 2)
    assert (found.precision is None) == (count - held < 5)
    assert (found.precision_real is None) == (held < 5)
    assert (f"{counted(held, 'image')} held out, wanted 5" in told) == (held < 5)
    assert f"learnt from {counted(count - held, 'image')}" in told
    assert "no share of copies" in told


def test_few_samples_are_measured_as_far_as_that_goes(real, judge):
    found = evaluate(real.held_out[:1], real.held_out_labels[:1], real, judge)
    assert (found.frechet, found.precision, found.recall) == (None, None, None)
    assert found.recognised == 1
    assert "no Fréchet distance: 1 sample, wanted 2" in found.remarks
    assert "no precision and recall: 1 sample, wanted 5" in found.remarks


def test_every_phase_has_a_name_and_a_bar(real, judge, monkeypatch):
    monkeypatch.setattr(features, "STEPS", 5)
    seen = []

    def bar(parts, name, unit):
        seen.append((name, unit))
        return parts

    evaluate(real.held_out, real.held_out_labels, real, train_judge(real, bar), bar)
    assert seen == [
        ("training a classifier", "step"), *[("features", "batch")] * 3,
        *[("nearest images", "part")] * 2,
    ]  # fmt: skip


def test_fid_by_torchmetrics_where_the_weights_are_at_hand(tmp_path, monkeypatch):
    images = torch.tensor([-1.0, 0.0, 1.0]).reshape(3, 1, 1, 1).expand(3, 1, 4, 4)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert inception_distance(images, images) is None  # nothing is fetched
    weights = tmp_path / "checkpoints" / inception.WEIGHTS
    weights.parent.mkdir()
    weights.write_bytes(b"")
    seen = []

    class Metric:
        def __init__(self, feature, feature_extractor_weights_path):
            seen.append((feature, feature_extractor_weights_path))

        def update(self, images, real):
            seen.append((images.dtype, tuple(images.shape), images[:, 2, 0, 0].tolist(), real))

        def compute(self):
            return torch.tensor(7.0)

    module = types.ModuleType("torchmetrics.image.fid")
    module.FrechetInceptionDistance = Metric
    for name in ("torchmetrics", "torchmetrics.image"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", module)
    assert inception_distance(images[1:], images) == 7
    assert seen == [
        (2048, str(weights)),
        (torch.uint8, (3, 3, 4, 4), [0, 128, 255], True),
        (torch.uint8, (2, 3, 4, 4), [128, 255], False),
    ]
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    assert inception_distance(images, images) is None
