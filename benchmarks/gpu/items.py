"""Items of work, done one by one in a child process: one that crashes or hangs costs only itself.

The parent never touches the GPU. It asks a child for an item, waits for the answer, and goes on in
a fresh child after an item that killed the last one, outlasted its seconds or left a dead CUDA
context. Items of a kind that does so twice go to the end; after MOST_ENDS what is left of the kind
is not run, so that a broken kernel does not cost a start of torch for each of its shapes.
child.py is the other side.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import pathlib
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from .running import end_group, first_error

PUT_OFF, MOST_ENDS = 2, 4  # ends of a child by items of one kind
SPARES = 2  # children that start beforehand, once one has ended
START = 60.0  # seconds in which a child has to be ready: it imports torch, lists its items
LEAST = 1.0  # seconds below which nothing more is begun


@dataclass(frozen=True)
class Item:
    """Attributes:
    kind: what it shares with others that fail as it does, such as an op with its variant.
    seconds: that it may take. least: that have to be left when it is begun.
    about: what the parent wants to know of it, whatever becomes of it.
    optional: not to have had the time for it is no failure.
    """

    name: str
    kind: str
    seconds: float = 30
    least: float = LEAST
    about: dict = field(default_factory=dict)
    optional: bool = False


@dataclass(frozen=True)
class Done:
    """result: what the item made of what it was given. error: why it failed. ended: the child
    did with it."""

    item: Item
    result: dict | None = None
    error: str = ""
    ended: bool = False


class Ended(Exception):
    """A child that is no more, and why."""


class Child:
    """A child talks to us through two named pipes, since a command in front of Python, such as
    compute-sanitizer, does not touch them. What it prints is passed on; `printed` is what it has
    printed since it was last asked."""

    def __init__(self, command: list[str], heard: Callable[[str], None]):
        self.heard, self.printed, self._rest, self.closed = heard, [], b"", False
        self.folder = tempfile.TemporaryDirectory()
        folder = pathlib.Path(self.folder.name)
        for name in ("asked", "said"):
            os.mkfifo(folder / name)
        # Opened for both, a pipe waits for nobody and does not end with the child.
        self.asked, self.said = (os.open(folder / n, os.O_RDWR) for n in ("asked", "said"))
        self.process = subprocess.Popen(
            [*map(str, command), "--child", str(folder)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        self.reader = threading.Thread(target=self._follow, daemon=True)
        self.reader.start()

    def wait(self, seconds: float) -> dict:
        """What it says when it is ready. Raises: Ended."""
        try:
            return self._answer(seconds)
        except BaseException:
            self.close(0)
            raise

    def ask(self, name: str, seconds: float, given: dict) -> dict:
        """Raises: Ended."""
        self.printed.clear()
        line = json.dumps({"name": name, "seconds": seconds, "given": given}) + "\n"
        os.write(self.asked, line.encode())
        return self._answer(seconds)

    def close(self, seconds: float = 20) -> int | None:
        """The exit status; after so many seconds it is killed."""
        if self.closed:
            return self.process.returncode
        self.closed = True
        try:
            os.close(self.asked)  # the end of its input
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(seconds)
        finally:  # also where a signal ends us meanwhile
            end_group(self.process)
            self.reader.join(2)
            if not self.reader.is_alive():
                self.process.stdout.close()
            os.close(self.said)
            self.folder.cleanup()
        return self.process.returncode

    def _answer(self, seconds: float) -> dict:
        end = time.monotonic() + seconds
        while True:
            left = end - time.monotonic()
            ended = self.process.poll() is not None  # before the pipe is looked at a last time
            if select.select([self.said], [], [], 0 if ended else min(max(left, 0), 0.1))[0]:
                self._rest += os.read(self.said, 1 << 16)
                line, found, rest = self._rest.partition(b"\n")
                if found:
                    self._rest = rest
                    return json.loads(line)
            elif ended:
                self.reader.join(2)
                raise Ended(f"{end_of(self.process.returncode)}{self._last_words()}")
            elif left <= 0:
                raise Ended(f"hung for {seconds:.0f} s{self._last_words()}")

    def _last_words(self) -> str:
        said = first_error([line for line in self.printed if line.strip()])
        return f": {said}" if said else ""

    def _follow(self) -> None:
        for line in self.process.stdout:
            self.printed.append(line)
            sys.stdout.write(line)
            sys.stdout.flush()
            self.heard(line)


def end_of(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"ended, status {status}"


class Run:
    """The items of a command, in children, within some seconds.

    Attributes:
        queue: what is not done yet; whoever iterates may take items out.
        facts: of the device, as the first child says them.
        broken: why no child could be started any more.
        left_out: items of kinds that ended too many children.
        total: how many items there are. statuses: with which the children ended.
        given: what an item is given. heard: is told what a child prints, and during which item.
    """

    def __init__(
        self,
        command: list[str],
        seconds: float,
        start: float = START,
        most_ends: int = MOST_ENDS,
    ):
        self.command, self.start, self.most_ends = command, start, most_ends
        self.end = time.monotonic() + seconds
        self.queue: list[Item] = []
        self.left_out: list[Item] = []
        self.facts: dict = {}
        self.total, self.broken, self.statuses = 0, "", []
        self.given: Callable[[Item], dict] = lambda item: {}
        self.heard: Callable[[str, Item | None], None] = lambda line, item: None
        self._child: Child | None = None
        self._spares: list[Child] = []
        self._ready: dict = {}
        self._item: Item | None = None
        self._ends = collections.Counter()

    def left(self) -> float:
        return self.end - time.monotonic()

    def __iter__(self) -> Iterator[Done]:
        try:
            self._started()
            self.queue = [Item(**fields) for fields in self._ready["items"]]
            self.facts, self.total = self._ready["facts"], len(self.queue)
            while item := next((i for i in self.queue if i.least <= self.left()), None):
                if (done := self._one(item)) is None:
                    break
                yield done
            self._close(max(3, min(20, self.left())))
        except Ended as error:
            self.broken = f"no child starts: {error}"
        finally:
            self._close(0)
            while self._spares:
                self._spares.pop().close(0)

    def drop(self, kind: str) -> None:
        """Nothing more of this kind is run."""
        self.left_out += [item for item in self.queue if item.kind == kind]
        self.queue[:] = [item for item in self.queue if item.kind != kind]

    def not_run(self, optional: bool = False) -> dict[str, int]:
        """Kind -> how many of its items were not run."""
        items = [*self.left_out, *self.queue]
        return dict(collections.Counter(i.kind for i in items if i.optional == optional))

    def _one(self, item: Item) -> Done | None:
        """None where the time was over before the item was, which then stays in the queue."""
        child, self._item = self._started(), item
        seconds = min(item.seconds, self.left())
        try:
            answer = child.ask(item.name, seconds, self.given(item))
        except Ended as error:
            self._close(0)
            if self.left() <= 0:
                return None
            self.queue.remove(item)
            self._count_end(item.kind)
            return Done(item, error=str(error), ended=True)
        if answer["late"] and seconds < item.seconds:
            return None
        self.queue.remove(item)
        if answer["dead"]:
            self._close(20)
            self._count_end(item.kind)
        return Done(item, answer["result"], answer["error"], answer["dead"])

    def _started(self) -> Child:
        """The child, or a fresh one; a second try where it does not start."""
        for last in (False, True):
            if self._child is None:
                fresh = self._spares.pop(0) if self._spares else Child(self.command, self._hear)
                try:
                    self._ready = fresh.wait(min(self.start, max(self.left(), LEAST)))
                    self._child = fresh
                except Ended:
                    if last or self.left() < LEAST:
                        raise
        while self._ends and len(self._spares) < SPARES and len(self._spares) < len(self.queue) - 1:
            self._spares.append(Child(self.command, self._hear))
        return self._child

    def _close(self, seconds: float) -> None:
        if self._child is not None:
            self.statuses.append(self._child.close(seconds))
            self._child = None

    def _count_end(self, kind: str) -> None:
        self._ends[kind] += 1
        if self._ends[kind] >= self.most_ends:
            self.drop(kind)
        elif self._ends[kind] >= PUT_OFF:
            self.queue.sort(key=lambda item: (item.optional, item.kind == kind))

    def _hear(self, line: str) -> None:
        self.heard(line, self._item)


def said_of(kinds: dict[str, int], most: int = 12) -> list[str]:
    """Lines, of the kinds with the most items first."""
    ordered = sorted(kinds.items(), key=lambda pair: -pair[1])
    lines = [f"{kind}: {count}" for kind, count in ordered[:most]]
    if len(ordered) > most:
        rest = ordered[most:]
        lines.append(f"{len(rest)} more kinds: {sum(count for _, count in rest)}")
    return lines
