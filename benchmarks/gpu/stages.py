"""The command line of a stage: the parent, or with --child a child that does the items."""

from __future__ import annotations

import argparse
import os
import pathlib
import signal
import sys
import time
import warnings
from collections.abc import Callable

from .child import serve
from .items import Run
from .stand_in import STAND_IN


def stage(
    module: str,
    description: str,
    make: Callable,
    parent: Callable[[Run, argparse.Namespace], int],
    seconds: float = 500,
    options: tuple[str, ...] = (),
    prefix: Callable[[argparse.Namespace], list[str]] = lambda arguments: [],
    reserve: float = 8,
) -> int:
    """The exit status of a process of this module.

    Args:
        make: make(arguments) is what a child does: see child.py.
        parent: parent(run, arguments) goes through the items.
        seconds: of the stage, where GPU_CHECK_END does not say when it ends.
        reserve: seconds before that end, for children to end and for the last lines.
        options: further ones of the command line, such as "--results".
        prefix: what stands before Python in a child's command.
    """
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--child", type=pathlib.Path, help=argparse.SUPPRESS)
    for name in options:
        parser.add_argument(name)
    arguments = parser.parse_args()
    if arguments.child:
        return serve(arguments.child, lambda: made(make, arguments))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and so end the child too
    end = float(os.environ.get("GPU_CHECK_END", time.monotonic() + seconds))
    seconds = end - time.monotonic() - reserve
    command = [*prefix(arguments), sys.executable, "-m", module, *sys.argv[1:]]
    return parent(Run(command, seconds), arguments)


def made(make: Callable, arguments: argparse.Namespace):
    """In a child."""
    import torch

    warnings.simplefilter("ignore")  # torch.compile's advice
    torch.manual_seed(0)
    if STAND_IN:
        torch.set_num_threads(1)  # as much as such small tensors need
    return make(arguments)
