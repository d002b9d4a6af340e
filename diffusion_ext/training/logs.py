"""What one watches a run by: numbers on the device that nobody waits for, a CSV, TensorBoard."""

from __future__ import annotations

import csv
import errno
import io
import os
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .checkpoints import write_whole
from .processes import Processes

LOG_NAME, TENSORBOARD_NAME = "log.csv", "tensorboard"
QUARTERS = 4
COLUMNS = (
    "step", "epoch", "images", "seconds", "loss", "loss_quarter_1", "loss_quarter_2",
    "loss_quarter_3", "loss_quarter_4", "validation_loss", "learning_rate", "gradient_norm",
    "images_per_second", "communication_ms", "skipped_steps",
)  # fmt: skip


class LossMeter:
    """Sums of losses on the device, in all and by the quarter of the timesteps.

    Args: timesteps: T; the first quarter is the least noisy.
    """

    def __init__(self, timesteps: int, device: torch.device):
        self.timesteps, self._quarters = timesteps, torch.arange(QUARTERS, device=device)
        self._none = torch.zeros(2 + 2 * QUARTERS, device=device)
        self.sums = self._none

    def add(self, trained: Tensor, losses: Tensor, t: Tensor) -> None:
        """trained: [B], weighted as they are trained; losses: [B] as they are; t: int64 [B]."""
        quarter = (QUARTERS * (t - 1)).div(self.timesteps, rounding_mode="floor")
        of_quarter = (quarter[:, None] == self._quarters).to(losses.dtype)  # [B, 4]
        total = torch.stack([trained.sum(), torch.ones_like(trained).sum()])
        self.sums = self.sums + torch.cat([total, losses @ of_quarter, of_quarter.sum(0)])

    def take(self) -> Tensor:
        """The sums since they were last taken, on the device."""
        taken, self.sums = self.sums, self._none
        return taken


def means(sums: Tensor) -> dict[str, float]:
    """The columns of the log that the sums of a LossMeter, on the host, tell."""
    loss, count, *rest = sums.tolist()
    values = {"loss": loss / count if count else float("nan")}
    for i in range(QUARTERS):
        if rest[QUARTERS + i]:
            values[f"loss_quarter_{i + 1}"] = rest[i] / rest[QUARTERS + i]
    return values


@dataclass
class _Pending:
    """A line of the log whose numbers are still on their way from the device."""

    known: dict[str, float]
    sums: Tensor
    norm: Tensor | None
    event: torch.cuda.Event | None

    def row(self) -> dict[str, float]:
        if self.event is not None:
            self.event.synchronize()  # a whole line ago: it is there
        norm = {} if self.norm is None else {"gradient_norm": self.norm.item()}
        return self.known | means(self.sums) | norm


class RunLog:
    """A run's log: a line of log.csv every so many steps, and the same numbers in TensorBoard.

    A line's numbers are copied from the device when it is due and written when the next one is, so
    that nobody waits for them. A line that cannot be written is a warning, once: the weights
    matter more.

    Args:
        folder: the run's. step, epoch: that it goes on from: what is beyond is another life's.
        meter: of the run; what it has gathered goes into each line.
        processes: of the run, the first of which writes what all have gathered.
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        meter: LossMeter,
        processes: Processes | None = None,
        epoch: int = 0,
    ):
        self.meter, self.processes = meter, processes or Processes()
        self._began = (time.perf_counter(), 0)
        self._start, self.before = time.perf_counter(), 0.0
        self._pending: _Pending | None = None
        self._file, self._board = None, None
        self._warned = False
        self.path = folder / LOG_NAME
        if self.processes.first:
            self._open(step, epoch)

    def _open(self, step: int, epoch: int) -> None:
        """The log, less the lines beyond a step, and the validation of epochs beyond."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = [row for row in read_log(self.path) if int(row["step"]) <= step] if step else []
        rows = [row for row in rows if not row["validation_loss"] or float(row["epoch"]) <= epoch]
        self.before = float(rows[-1]["seconds"]) if rows else 0.0
        kept = io.StringIO(newline="")
        writer = csv.DictWriter(kept, COLUMNS)
        writer.writeheader()
        writer.writerows({name: row.get(name, "") for name in COLUMNS} for row in rows)
        write_whole(self.path, kept.getvalue().encode())
        # Not buffered: what could not be written is known at once, and not tried again.
        self._file = self.path.open("ab", buffering=0)
        self._board = _tensorboard(self.path.parent / TENSORBOARD_NAME, step)

    @property
    def seconds(self) -> float:
        """Of training so far, those before a resumption among them."""
        return self.before + time.perf_counter() - self._start

    def begin(self, images: int) -> None:
        """From here on it is trained, after so many images; the next line tells how fast."""
        self._began = time.perf_counter(), images

    def line(self, known: dict[str, float], norm: Tensor | None) -> None:
        """A line is due: what the host knows of it, and the norm, which is on the device."""
        self.flush()
        start, images = self._began
        speed = (known["images"] - images) / (time.perf_counter() - start)
        known = {**known, "images_per_second": speed, "seconds": round(self.seconds, 3)}
        self.begin(known["images"])
        sums, event = self.processes.sum(self.meter.take()), None
        if sums.device.type == "cuda":
            sums = sums.to("cpu", non_blocking=True)
            norm = None if norm is None else norm.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending = _Pending(known, sums, norm, event)

    def flush(self) -> None:
        """Writes the line that is due."""
        if self._pending is not None:
            row, self._pending = self._pending.row(), None
            self.write(row)

    def write(self, row: dict[str, float]) -> None:
        """A line of numbers that the host knows."""
        if not self.processes.first:
            return
        try:
            if not self.path.exists():  # somebody removed the folder
                self._close_files()
                self._open(0, 0)
            self._write_line({key: _short(value) for key, value in row.items()})
            for name in row.keys() - {"step", "epoch", "images", "seconds"} if self._board else ():
                self._board.add_scalar(name, row[name], int(row["step"]))
        except OSError as error:
            self._warn(error)

    def _write_line(self, row: dict) -> None:
        """Whole or not at all."""
        text = io.StringIO(newline="")
        csv.DictWriter(text, COLUMNS).writerow(row)
        line, end = text.getvalue().encode(), self._file.seek(0, os.SEEK_END)
        try:
            if self._file.write(line) == len(line):
                return
        except OSError:
            self._file.truncate(end)
            raise
        self._file.truncate(end)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            warnings.warn(
                f"log: {self.path} misses lines, which cannot be written: {error}", stacklevel=3
            )
        self._warned = True

    def picture(self, name: str, pixels: np.ndarray, step: int) -> None:
        """uint8 [H, W, 3], for TensorBoard."""
        try:
            if self._board:
                self._board.add_image(name, pixels, step, dataformats="HWC")
        except OSError as error:
            self._warn(error)

    def close(self) -> None:
        self.flush()
        self._close_files()

    def _close_files(self) -> None:
        try:
            if self._file:
                self._file.close()
            if self._board:
                self._board.close()
        except OSError as error:
            self._warn(error)


def read_log(path: str | Path) -> list[dict[str, str]]:
    """The lines of a log.csv, without one that was cut short; none if there is no file."""
    if not Path(path).is_file():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if None not in row.values() and row["step"]]


def _short(value: float) -> float | str:
    return f"{value:.6g}" if isinstance(value, float) else value


def _tensorboard(folder: Path, step: int):
    """A writer, or None where tensorboard is not installed (the extra [train])."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step)  # what is beyond is another life's
