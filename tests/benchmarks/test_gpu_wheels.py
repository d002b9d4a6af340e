"""Which wheels a machine without network lacks: benchmarks/gpu/wheels.py."""

import pathlib
import sys
import zipfile

import pytest

sys.path.append(str(pathlib.Path(__file__).resolve().parents[2]))

from benchmarks.gpu import wheels


@pytest.fixture
def carry(tmp_path):
    def write(name, version, *needs):
        path = tmp_path / f"{name}-{version}-py3-none-any.whl"
        lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {n}" for n in needs)]
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"{name}-{version}.dist-info/METADATA", "\n".join(lines) + "\n\n")
        return path.name

    write.folder = tmp_path
    return write


def test_a_whole_set(carry):
    carry("one", "1.0", "two>=2", "numpy", "old; python_version < '3.8'", "docs; extra == 'doc'")
    carry("two", "2.1")
    assert wheels.missing(carry.folder) == []


def test_what_is_lacking(carry):
    one = carry("one", "1.0", "two>=2", "three")
    carry("two", "1.9")
    assert wheels.missing(carry.folder) == [f"{one} needs two>=2", f"{one} needs three"]
    carry("two", "2.0")
    assert "two versions" in wheels.missing(carry.folder)[0]
