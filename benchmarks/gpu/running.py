"""How gpu_check.py runs its steps: processes with a limit, all that they say kept, a summary."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field

ROOT = pathlib.Path(__file__).resolve().parents[2]
# What is said of torch's own calls is not about us; a process that imports torch starts slowly.
SANITIZER_OPTIONS = {"--error-exitcode": "86", "--report-api-errors": "no", "--launch-timeout": "0"}
# The line that says what went wrong, in the words of Python, pytest, nvcc, g++, compute-sanitizer.
WRONG = re.compile(
    r"^\w*(?:Error|Exception)\b.*|^E  .*|^FAILED.*|.*\berror:? .*"
    r"|=+ (?:Invalid|(?:Error: )?Race|Uninit|Barrier).*"
)
MOST_LINES, MOST_CHARACTERS = 95, 11_000  # of a summary: some show the end of an output alone
FAILED = "FAILED "  # so begins a line that a summary has


@dataclass
class Step:
    """A process of a stage, with the seconds that it may take at least."""

    stage: str
    name: str
    command: list
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)
    folder: pathlib.Path = ROOT
    needed: bool = False  # without it none of the later ones can run
    least: float = 0  # seconds below which it is skipped
    skipped: str = ""  # why


@dataclass
class Outcome:
    step: Step
    result: str  # passed, failed (...), timed out, skipped (...)
    seconds: float = 0
    limit: float = 0
    error: str = ""  # the first line that says what went wrong
    failures: list[str] = field(default_factory=list)  # what it printed after FAILED, in its order
    last: str = ""  # the last line that it printed

    @property
    def good(self) -> bool:
        return self.result.partition(" ")[0] in ("passed", "skipped")


class Log:
    """All that the steps of a call print, in a file and on our own output."""

    def __init__(self, folder: pathlib.Path, call: str):
        self.file = (folder / f"{call}.log").open("w", encoding="utf-8")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def say(self, line: str) -> None:
        for out in (self.file, sys.stdout):
            out.write(line)
            out.flush()


def run(step: Step, limit: float, log: Log) -> Outcome:
    """The step and what it started end with its time."""
    start, lines = time.monotonic(), []
    said = {"PYTHONUNBUFFERED": "1", "GPU_CHECK_END": str(start + limit)}  # every process's clock
    process = subprocess.Popen(
        [str(part) for part in step.command],
        cwd=step.folder,
        env={**os.environ, **said, **step.environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # a group to end as a whole
    )

    def follow():
        for line in process.stdout:
            lines.append(line)
            log.say(line)

    reader = threading.Thread(target=follow, daemon=True)
    reader.start()
    try:
        status = process.wait(limit)
        result = "passed" if status == 0 else f"failed (status {status})"
    except subprocess.TimeoutExpired:
        result = "timed out"
    finally:
        end_group(process, grace=12)  # in which a stage ends its own children
    reader.join(5)
    if not reader.is_alive():
        process.stdout.close()
    outcome = Outcome(step, result, time.monotonic() - start, limit)
    outcome.error = "" if result == "passed" else first_error(lines)
    outcome.failures = [line[len(FAILED) :].strip() for line in lines if line.startswith(FAILED)]
    outcome.last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return outcome


def end_group(process: subprocess.Popen, grace: float = 5) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(grace)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            pass


def first_error(lines: list[str]) -> str:
    found = next((line for line in lines if WRONG.match(line)), lines[-1] if lines else "")
    return found.strip()[:200]


def run_all(steps: list[Step], seconds: float, log: Log) -> list[Outcome]:
    """A step may take all the time that the later ones do not need; one that is needed, any."""
    end, outcomes, missing = time.monotonic() + seconds, [], ""
    for i, step in enumerate(steps):
        later = sum(other.seconds for other in steps[i + 1 :] if not other.skipped)
        limit = max(end - time.monotonic() - (0 if step.needed else later), 1)
        if missing:
            outcome = Outcome(step, f"not run ({missing})")
        elif step.skipped:
            outcome = Outcome(step, f"skipped ({step.skipped})")
        elif limit < step.least:
            outcome = Outcome(step, f"skipped ({limit:.0f} s left)", limit=limit)
        else:
            log.say(f"\n=== {step.stage}: {step.name}, at most {limit:.0f} s\n")
            try:
                outcome = run(step, limit, log)
            except OSError as error:
                outcome = Outcome(step, f"failed ({error})")
            if step.needed and not outcome.good:
                missing = f"{step.stage}: {step.name} {outcome.result}"
        log.say(f"=== {step.stage}: {step.name} {outcome.result}, {outcome.seconds:.0f} s\n")
        outcomes.append(outcome)
    return outcomes


def summary(call: str, outcomes: list[Outcome], results: pathlib.Path, since: float = 0) -> str:
    """Short Markdown, worst first. since: the time of the oldest JSON file of it."""
    lines = [f"# The {call} call", ""]
    bad = [o for o in outcomes if not o.good]
    for o in bad:
        lines.append(f"* **{o.step.stage}: {o.step.name} {o.result}** {o.error}")
        most = max(60 // len(bad), 5)
        lines += [f"    * {line[:200]}" for line in o.failures[:most]]
        if len(o.failures) > most:
            lines.append(f"    * ... {len(o.failures) - most} more in the log")
    for path in sorted(results.glob("*/*.json")):
        if path.stat().st_mtime < since:
            continue
        if said := json.loads(path.read_text(encoding="utf-8")).get("summary"):
            lines += ["", f"## {path.stem}", "", *(f"* {line}" for line in said)]
    table = seconds_table(outcomes)
    cut, room = len(lines), MOST_CHARACTERS - len("\n".join(table))
    while cut + len(table) > MOST_LINES or len("\n".join(lines[:cut])) > room:
        cut -= 1
    if cut < len(lines):
        lines[cut:] = ["* ... more in the JSON files"]
    return "\n".join([*lines, *table]) + "\n"


def seconds_table(outcomes: list[Outcome]) -> list[str]:
    heads = ["stage", "step", "seconds", "planned", "result", "its last line"]
    rows = [
        [o.step.stage, o.step.name, f"{o.seconds:.0f}", f"{o.step.seconds:.0f}", o.result, said(o)]
        for o in outcomes
    ]
    lines = [heads, ["---"] * len(heads), *rows]
    return ["", "## Seconds", "", *(f"| {' | '.join(line)} |" for line in lines)]


def said(outcome: Outcome) -> str:
    return outcome.last[:80].replace("|", "")


def sanitizer() -> tuple[str | None, list[str]]:
    """compute-sanitizer, of PATH or of nvcc's toolkit, and the options that it knows."""
    sys.path.insert(0, str(ROOT / "csrc" / "cuda"))
    from toolkit import Toolkit

    found = shutil.which("compute-sanitizer")
    try:
        for folder in ("bin", "compute-sanitizer"):
            found = found or shutil.which("compute-sanitizer", path=Toolkit().home / folder)
    except (OSError, subprocess.CalledProcessError):  # no toolkit
        pass
    if found is None:
        return None, []
    known = subprocess.run([found, "--help"], capture_output=True, text=True).stdout
    options = [o for pair in SANITIZER_OPTIONS.items() if pair[0] in known for o in pair]
    return found, options
