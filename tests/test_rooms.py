"""The package's rooms stand in one order: each imports only from those below it."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parents[1] / "diffusion_ext"
# From the top down; CONTRIBUTING.md says what is in each.
ROOMS = ["app", "integrations", "training", "sampling", "fusing", "nn", "samplers", "ops", "checks"]
# Of no room: the public names, and what they are started and counted with.
OUTSIDE = {"__init__", "__main__", "version"}


def imports(source: str, module: str) -> set[str]:
    """The modules of the package that a module imports anywhere in its text, as app.cli."""
    package = module.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = ["diffusion_ext", *package][: len(package) + 2 - node.level]
            base += node.module.split(".") if node.module else []
            names = [".".join([*base, alias.name]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {n.partition(".")[2] for n in names if n.startswith("diffusion_ext.")}
    return found


def upward(source: str, module: str) -> list[str]:
    """The imports of a module that reach into a room above its own."""
    above = ROOMS[: ROOMS.index(module.split(".")[0])]
    return sorted(name for name in imports(source, module) if name.split(".")[0] in above)


MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def test_every_module_has_a_room():
    assert {name.split(".")[0] for name in MODULES} - OUTSIDE == set(ROOMS)


@pytest.mark.parametrize("module", [name for name in MODULES if name not in OUTSIDE])
def test_nothing_is_imported_from_a_room_above(module):
    assert upward(MODULES[module].read_text(), module) == []


def test_an_import_from_above_is_seen():
    assert upward("from ..samplers import ddim", "ops.perturb") == ["samplers.ddim"]
    assert upward("def f():\n    from .. import nn", "ops.perturb") == ["nn"]
    assert upward("import diffusion_ext.nn.fuse", "ops.perturb") == ["nn.fuse"]
    assert upward("from diffusion_ext.app import cli", "training.data") == ["app.cli"]
    assert upward("from ..checks import moved\nfrom . import backend", "ops.perturb") == []


def test_a_process_of_a_test_is_not_on_the_stand_in_for_a_gpu():
    """Pytest puts folders of tests on the path, and some tests hand that path on."""
    if "stand_in_gpu" in sys.modules:
        pytest.skip("this process is on it")
    folders = [str(path.parent) for path in PACKAGE.parent.glob("tests/**/test_*.py")]
    code = "import sys, torch; print('stand_in_gpu' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, *set(folders)])}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False"]
