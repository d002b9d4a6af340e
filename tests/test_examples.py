"""Each script of examples/ runs as it stands, and is in the list."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).resolve().parents[1] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_it_runs(script, tmp_path):
    if "diffusers" in script.read_text():
        pytest.importorskip("diffusers")
    environment = {**os.environ, "DIFFUSION_EXT_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:diffusion_ext", str(script)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    if script.stem == "faster_pipeline":
        assert float(re.search(r"largest difference (\S+)", done.stdout)[1]) < 1e-4
    assert "nan" not in done.stdout


def test_every_script_is_listed():
    listed = re.findall(r"^\| \[(\w+\.py)\]", (EXAMPLES / "README.md").read_text(), re.M)
    assert sorted(listed) == [script.name for script in SCRIPTS]
    assert all(len(script.read_text().splitlines()) <= 40 for script in SCRIPTS)
