"""The table of torch's releases in docs/install.md: what a wheel does beside each of them.

    python release/torch_releases.py dist/cpu/*.whl dist/cuda/*.whl [--torch 2.10.0 2.14.1]

`make wheels` and `make wheels CUDA=1` build the wheels; one of them will do. By default it is the
newest release of each minor version that the package index has, from the oldest that pyproject.toml
admits on. Each is installed in an empty environment, gigabytes where it is a build with CUDA, which
is removed before the next. What is not tried, or cannot be installed now, keeps its words and its
date. Ends with status 1 where a release could not be tried or the results were not right.
"""

from __future__ import annotations

import argparse
import datetime
import pathlib
import re
import subprocess
import sys
import tempfile
import zipfile

import hub_kernel
import wheels

PAGE = wheels.ROOT / "docs" / "install.md"
BEGIN, END = "<!-- written by release/torch_releases.py -->\n", "<!-- until here -->\n"
HEAD = (
    "| torch | the wheel without CUDA | the wheel with CUDA |\n"
    "|---|---|---|\n"
)  # fmt: skip
SAID = re.compile(r"torch \S+ \((.*?)\), Python [\d.]+: (.*) loaded, results right")

Rows = dict[str, list[str]]  # release -> [its CUDA, beside the wheel without CUDA, with]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("wheels", type=pathlib.Path, nargs="+")
    parser.add_argument("--torch", nargs="+", help="releases; default: the newest of each minor")
    options = parser.parse_args()
    failed = []
    for release in options.torch or newest_of_each(on_the_index(), oldest()):
        try:
            row = tried(release, options.wheels)
        except subprocess.CalledProcessError as error:
            print(f"torch {release} keeps its row: {error}", file=sys.stderr)
            failed.append(release)
            continue
        PAGE.write_text(with_row(PAGE.read_text(encoding="utf-8"), release, row), encoding="utf-8")
        failed += [release] * any("wrong" in cell for cell in row)
    sys.exit(f"not right, or not tried: {', '.join(failed)}" if failed else 0)


def oldest() -> str:
    return re.search(r'"torch>=([\d.]+)"', (wheels.ROOT / "pyproject.toml").read_text())[1]


def on_the_index() -> list[str]:
    """Every release that pip finds for this Python."""
    command = [sys.executable, "-m", "pip", "index", "versions", "torch"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    listed = re.search(r"Available versions: (.*)", said)[1].split(", ")
    return [name for name in listed if re.fullmatch(r"[\d.]+(\+\w+)?", name)]  # no candidates


def newest_of_each(releases: list[str], oldest: str) -> list[str]:
    """Of each minor version from `oldest` on; local parts, as in "2.13.0+cpu", are left to pip."""
    newest: dict[tuple[int, ...], str] = {}
    for release in sorted({name.partition("+")[0] for name in releases}, key=numbers):
        if numbers(release) >= numbers(oldest):
            newest[numbers(release)[:2]] = release
    return list(newest.values())


def numbers(release: str) -> tuple[int, ...]:
    return tuple(map(int, release.split(".")))


def tried(release: str, files: list[pathlib.Path]) -> list[str]:
    """A row's cells; "" for a wheel that is not there.

    Raises: subprocess.CalledProcessError where that torch cannot be installed.
    """
    row = ["", "", ""]
    with tempfile.TemporaryDirectory() as folder:
        python = wheels.environment(pathlib.Path(folder), f"torch=={release}")
        for file in files:
            with zipfile.ZipFile(file) as wheel:
                column = 1 if hub_kernel.backend_of(wheel) == "cpu" else 2
            try:
                said = wheels.use(python, file)
            except subprocess.CalledProcessError as error:
                said = error.stdout or str(error)
            cuda, cell = result(said, column == 2)
            row[0], row[column] = cuda or row[0], f"{cell} ({datetime.date.today()})"
    return row


def result(said: str, has_cuda: bool) -> tuple[str, str]:
    """(torch's CUDA, how it went) of what smoke.py said beside a wheel with CUDA or without."""
    found = SAID.search(said)
    if found is None:
        return "", f"wrong: {said.strip().splitlines()[-1].replace('|', '/')}"
    cuda, devices = found.groups()
    if not has_cuda:
        return cuda, "right"
    if devices == "cpu and cuda":
        return cuda, "right, and loaded"
    if cuda == "no CUDA":
        return cuda, "right; there is no CUDA to load it"
    return cuda, "right; its CUDA library is not loaded"


def with_row(page: str, release: str, row: list[str]) -> str:
    """The page with this row's cells, where it has any; the others are left.

    Raises: ValueError for a page without the table's marks.
    """
    if BEGIN not in page or END not in page:
        raise ValueError(f"{PAGE.name}: wanted the lines {BEGIN.strip()} and {END.strip()}")
    before, _, rest = page.partition(BEGIN)
    table, _, after = rest.partition(END)
    rows = read(table)
    known = rows.get(release, ["", "", ""])
    rows[release] = [new or old for new, old in zip(row, known, strict=True)]
    return before + BEGIN + written(rows) + END + after


def read(table: str) -> Rows:
    """The rows of a table that `written` wrote."""
    lines = re.findall(r"^\| ([\d.]+) \((.*?)\) \| (.*?) \| (.*?) \|$", table, re.M)
    return {release: cells for release, *cells in lines}


def written(rows: Rows) -> str:
    ordered = sorted(rows.items(), key=lambda row: numbers(row[0]))
    lines = (f"| {name} ({cuda}) | {cpu} | {gpu} |\n" for name, (cuda, cpu, gpu) in ordered)
    return HEAD + "".join(lines)


if __name__ == "__main__":
    main()
