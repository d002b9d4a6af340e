"""The tutorials run, and keep the pictures of a run."""

import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "release"))


def pictures(notebook) -> int:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "docs" / "tutorials").glob("*.ipynb")), ids=lambda path: path.stem
)
def test_it_runs(path, tmp_path):
    for package in ("nbclient", "diffusers", "sklearn", "matplotlib"):
        pytest.importorskip(package)
    import nbformat
    from notebooks import executed

    kept = nbformat.read(path, as_version=4)
    assert pictures(executed(path, tmp_path)) == pictures(kept)
    assert pictures(kept) >= (path.stem != "new_op")
