"""Runs the tutorials and keeps their results in them: `make notebooks`.

A result that names this machine, or a warning, is an error: people read them.
"""

from __future__ import annotations

import os
import pathlib
import sys
import tempfile

import nbformat
from nbclient import NotebookClient

TUTORIALS = pathlib.Path(__file__).resolve().parents[1] / "docs" / "tutorials"
SECONDS = 900  # of a cell


def executed(path: pathlib.Path, folder: pathlib.Path) -> nbformat.NotebookNode:
    """The notebook with the results of a run in the folder. Raises: what a cell raises."""
    os.environ["PYTHONWARNINGS"] = "ignore"  # such as of widgets, which no page has
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=SECONDS, resources={"metadata": {"path": folder}})
    client.execute()
    notebook.metadata = {"language_info": {"name": "python"}}
    for cell in notebook.cells:
        cell.metadata = {}
        for output in cell.get("outputs", []):
            _tidy(output, path.name)
    return notebook


def _tidy(output: dict, name: str) -> None:
    if output.get("name") == "stderr":
        raise ValueError(f"{name}: a cell warns: {output['text']}")
    data = output.get("data", {})
    if "image/png" in data:  # enough of a picture
        output["data"] = {"image/png": data["image/png"], "text/plain": "a picture"}
    text = output.get("text", "")
    for private in (str(TUTORIALS.parents[1]), tempfile.gettempdir()):
        if private in text:
            raise ValueError(f"{name}: a result names this machine: {text}")


def main() -> None:
    for path in map(pathlib.Path, sys.argv[1:] or sorted(TUTORIALS.glob("*.ipynb"))):
        print(f"running {path.name}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            nbformat.write(executed(path, pathlib.Path(folder)), path)


if __name__ == "__main__":
    main()
