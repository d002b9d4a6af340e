"""A small network trained on the real images: their classifier, and a source of features.

What it says is about images like those: its numbers compare runs on the same data, no others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .bars import SILENT, Bar

HELD_OUT = 0.2  # of the images with a label, where the run holds out none
FEATURES = 64
STEPS, BATCH, RATE = 600, 128, 3e-3
ROTATIONS = 4
LARGEST_MAP = 16  # pixels, of the first convolution


class FeatureNetwork(nn.Module):
    """Images [B,C,S,S] -> features [B, 64] -> scores of classes.

    Args: channels: C. side: S. classes: how many.
    """

    def __init__(self, channels: int, side: int, classes: int):
        super().__init__()
        layers: list[nn.Module] = []
        for into, stride in ((32, 1 if side <= LARGEST_MAP else 2), (64, 2), (128, 2)):
            layers += [nn.Conv2d(channels, into, 3, stride, 1), nn.BatchNorm2d(into), nn.ReLU()]
            layers += [nn.Conv2d(into, into, 3, 1, 1), nn.BatchNorm2d(into), nn.ReLU()]
            channels = into
        pool = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, FEATURES)]
        self.features = nn.Sequential(*layers, *pool, nn.ReLU())
        self.dropout, self.scores = nn.Dropout(0.3), nn.Linear(FEATURES, classes)

    def forward(self, images: Tensor) -> Tensor:  # [B,C,S,S] -> [B, classes]
        return self.scores(self.dropout(self.features(images)))


@dataclass(frozen=True)
class RealImages:
    """Real images, [N,C,S,S] in [-1, 1], and their classes, int64 [N], or None.

    `held_out` are those that neither the run nor the classifier was trained on. seen_by_run: the
    run was trained on them all the same, because it held out none.
    """

    trained: Tensor
    held_out: Tensor
    trained_labels: Tensor | None = None
    held_out_labels: Tensor | None = None
    seen_by_run: bool = False

    def labels_for(self, count: int) -> Tensor | None:
        """int64 [count]: the classes, as often as here and in order; None without labels."""
        if self.trained_labels is None:
            return None
        ordered = self.trained_labels.sort().values
        return ordered[(torch.arange(count) + 0.5).mul(len(ordered) / count).long()]

    @classmethod
    def without_split(cls, images: Tensor, labels: Tensor | None) -> RealImages:
        """Of a run that held out no images: a fifth is held out from the classifier alone."""
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        cut = round(HELD_OUT * len(images))
        held, rest = order[:cut], order[cut:]
        of_labels = (None, None) if labels is None else (labels[rest], labels[held])
        return cls(images[rest], images[held], *of_labels, seen_by_run=True)


@dataclass(frozen=True)
class Judge:
    """A feature network that has been trained.

    Attributes:
        network: in evaluation mode. of_classes: whether it tells the data's classes; else how an
            image has been turned, which it learned for want of classes.
        accuracy: on real images that it was not trained on; None where there are none.
    """

    network: FeatureNetwork
    of_classes: bool
    accuracy: float | None

    @torch.no_grad()
    def features(self, images: Tensor, bar: Bar = SILENT) -> Tensor:
        """Of images [N,C,S,S] in [-1, 1]: float32 [N, 64]."""
        parts = bar(images.split(BATCH), "features", unit="batch")
        return torch.cat([self.network.features(part) for part in parts])

    @torch.no_grad()
    def classes(self, images: Tensor) -> Tensor:
        """What it takes images [N,C,S,S] in [-1, 1] for: int64 [N]."""
        return torch.cat([self.network(part).argmax(1) for part in images.split(BATCH)])


def train_judge(real: RealImages, bar: Bar = SILENT) -> Judge:
    """Trains a feature network on real images, always alike, and measures it on those held out.

    Without labels it learns to tell by which quarter turns images were rotated (Gidaris et al.
    2018). bar: shows how far it has come.
    """
    images, labels = real.trained, real.trained_labels
    held_out, held_out_labels = real.held_out, real.held_out_labels
    of_classes = labels is not None
    if not of_classes:
        (images, labels), (held_out, held_out_labels) = _turned(images), _turned(held_out)
    classes = int(torch.cat([labels, held_out_labels]).max()) + 1
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        network = FeatureNetwork(images.shape[1], images.shape[3], classes)
        optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=0.05)
        rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
        for _ in bar(range(STEPS), "training a classifier", unit="step"):
            chosen = torch.randint(len(images), (BATCH,))
            loss = F.cross_entropy(
                network(_shifted(images[chosen])), labels[chosen], label_smoothing=0.1
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rates.step()
    judge = Judge(network.eval(), of_classes, None)
    if not len(held_out):
        return judge
    right = (judge.classes(held_out) == held_out_labels).double().mean().item()
    return replace(judge, accuracy=right)


def _shifted(images: Tensor) -> Tensor:
    """Each by up to an eighth of its side in either direction, the edges repeated."""
    most = max(images.shape[3] // 8, 1)
    padded = F.pad(images, [most] * 4, mode="replicate")
    side = images.shape[3]
    places = torch.randint(2 * most + 1, (len(images), 2)).tolist()
    pairs = zip(padded, places, strict=True)
    return torch.stack([image[:, y : y + side, x : x + side] for image, (y, x) in pairs])


def _turned(images: Tensor) -> tuple[Tensor, Tensor]:
    """All four rotations of the images, and their numbers."""
    turned = torch.cat([images.rot90(k, (2, 3)) for k in range(ROTATIONS)])
    return turned, torch.arange(ROTATIONS).repeat_interleave(len(images))
