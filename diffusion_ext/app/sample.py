"""The command `sample`: pictures of a run, by any sampler."""

from __future__ import annotations

from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from ..sampling import sample
from ..sampling.engines import ENGINES
from ..training import StateDictOptions, TrainedModel, load_trained
from ..training.folder_lock import FolderLock
from ..training.processes import Processes
from ..training.torchrun import joined
from ..training.weights_files import file_of, is_weights
from .page import show, write_page
from .places import RUN, RunPath, device_of
from .player import STYLE
from .sample_pictures import save_pictures
from .sample_set import SampleSet, digest_of
from .sampler_options import SamplerOptions

DDPM_FRAME_RATE = 20


class Drawn(NamedTuple):
    """images [B, C, S, S], their labels [B], if any, and the page's player of their denoising."""

    images: Tensor
    labels: Tensor | None
    player: str


@dataclass(frozen=True)
class Sample(SamplerOptions):
    """Draw samples of a run: a grid, the denoising as an animation and as a page; or, with --count,
    a set of them in files, by the processes that torchrun starts."""

    run_folder: RunPath = RUN
    """a folder that `train` wrote, one of its checkpoints, or weights alone (.pth, .pt,
    .safetensors): what `export` wrote, or the course's, whose classes are numbered"""
    out: Path | None = None
    """folder for the pictures; default the run's"""
    classes: tuple[str, ...] = ()
    """draw these alone: their names, or their numbers from 0; default all of them"""
    per_class: int = 10
    """samples of each class, in the grid"""
    count: int | None = None
    """write so many samples as files to --out, the classes in turn; what is there already stays"""
    format: Literal["npz", "png"] = "npz"
    """of --count: an .npz for each batch, or a picture for each sample in its class's folder"""
    batch: int = 100
    """of --count: samples drawn at once"""
    device: str = "auto"
    """torch device; auto is CUDA where there is one"""
    engine: Literal[ENGINES] = "eager"
    """what runs the network; auto measures them all once on this machine and takes the fastest"""
    open: bool = False
    """show the page in a browser"""
    state_dict: Annotated[StateDictOptions, tyro.conf.arg(name="")] = field(
        default_factory=StateDictOptions
    )

    def run(self) -> None:
        if self.count is not None:
            self.draw_set(self.count)
            return
        drawn, page = self.draw(), self.folder / "samples.html"
        write_page(page, f"Samples of {self.run_folder}", drawn.player, STYLE)
        print(f"page        {page}")
        if self.open:
            show(page)

    @property
    def folder(self) -> Path:
        """Of the pictures."""
        return self.out or file_of(self.run_folder).parent

    def _trained(self) -> TrainedModel:
        if self.run_folder == RUN and self.classes and is_weights(self.classes[-1]):
            raise ValueError(
                f"classes: {self.classes[-1]} is a run, which comes before the options: "
                f"diffusion-ext sample {self.classes[-1]} --classes ..."
            )
        return load_trained(self.run_folder, self.state_dict)

    def _chosen(self, trained: TrainedModel) -> tuple[int, ...]:
        """The classes to draw, by their numbers; () where there are none."""
        return tuple(trained.labels(self.classes or trained.class_names).tolist())

    def draw(self) -> Drawn:
        """Writes the pictures."""
        if self.per_class < 1:
            raise ValueError(f"per_class: wanted at least 1, got {self.per_class}")
        trained = self._trained()
        model = trained.model.to(device_of(self.device), memory_format=torch.channels_last)
        chosen = self._chosen(trained)
        names = [trained.class_names[number] for number in chosen]
        count = self.per_class * max(len(names), 1)
        labels = torch.tensor(chosen).repeat_interleave(self.per_class) if names else None
        table = self.table(trained)
        result = sample(
            model,
            (count, *trained.shape),
            table,
            context=labels,
            guidance_scale=self.guidance if names else 1.0,
            seeds=self.seed,
            engine=self.engine,
            save_rate=DDPM_FRAME_RATE if self.sampler == "ddpm" else 1,
        )
        player = save_pictures(self.folder, result, table, names, self.per_class)
        return Drawn(result.images, labels, player)

    def draw_set(self, count: int) -> None:
        """Writes samples as files: the batches go round the processes, and the images are
        the same whatever their number."""
        for name, value in (("count", count), ("batch", self.batch)):
            if value < 1:
                raise ValueError(f"{name}: wanted at least 1, got {value}")
        if self.out is None:
            raise ValueError("out: wanted a folder for the samples of --count, got none")
        device, trained = device_of(self.device), self._trained()
        chosen = self._chosen(trained)
        files = SampleSet(self.out, trained.class_names, self.format == "png", chosen)
        record = {
            "checkpoint": digest_of(file_of(self.run_folder)), "format": self.format,
            "batch": self.batch, "classes": list(trained.class_names),
            "sampler": self.record(trained),
        }  # fmt: skip
        if self.classes:
            record["chosen"] = list(chosen)
        if self.engine != "eager":  # others round otherwise
            record["engine"] = self.engine
        with joined(device) as processes, ExitStack() as stack:
            if processes.first:
                stack.enter_context(closing(FolderLock(self.out)))
                files.begin(record)
            processes.wait()
            parts = [range(i, min(i + self.batch, count)) for i in range(0, count, self.batch)]
            self._draw_parts(files, trained, parts[processes.rank :: processes.count], processes)
            processes.wait()
            if processes.first:
                print(f"samples     {count} in {self.out}")

    def _draw_parts(
        self, files: SampleSet, trained: TrainedModel, parts: list[range], processes: Processes
    ) -> None:
        model = trained.model.to(device_of(self.device), memory_format=torch.channels_last)
        table, classes = self.table(trained), trained.class_names
        shape = (self.batch, *trained.shape)
        for numbers in tqdm(parts, "sampling", unit="batch", disable=not processes.first or None):
            if files.has(numbers):
                continue
            # Always a whole batch: the rounding of a network's sums may depend on its size.
            drawn = range(numbers[0], numbers[0] + self.batch)
            result = sample(
                model,
                shape,
                table,
                context=files.labels(drawn),
                guidance_scale=self.guidance if classes else 1.0,
                seeds=self.seed + numbers[0],
                engine=self.engine,
                progress=False,
            )
            files.write(numbers, result.images[: len(numbers)])
