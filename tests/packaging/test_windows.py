"""What is to work on Windows, as far as Linux shows it: see windows/sitecustomize.py."""

import ast
import io
import json
import os
import pathlib
import pickle
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from diffusion_ext.app.sample_set import SampleSet
from diffusion_ext.training import held_files, read_log, sharded_checkpoints
from diffusion_ext.training.data.mapped import map_image_array

HERE = pathlib.Path(__file__).parent
PACKAGE = HERE.parents[1] / "diffusion_ext"
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join([str(HERE / "windows"), os.environ.get("PYTHONPATH", "")]),
    "PYTHONIOENCODING": "cp1252",  # what a pipe has there
    "PYTHONWARNDEFAULTENCODING": "1",
    "OMP_NUM_THREADS": "1",
}
OF_OURS = """
    def ours(code):  # as if it stood in a module of ours
        exec(code, space := {"__name__": "diffusion_ext.of_test"})
        return space
"""
TINY = """
    import sys, pathlib
    import numpy as np
    import diffusion_ext as dx
    from diffusion_ext.app.cli import main
    from diffusion_ext.training.evaluation import features
    features.STEPS = 5
    TRAIN = ["train", "--data", "set.npz", "--out", "run", "--n-feat", "8", "--timesteps", "10",
             "--batch-size", "8", "--log-every", "1", "--optimizer", "AdamW", "--epochs"]
    def run(*words):
        assert main([str(word) for word in words]) == 0, words
    if __name__ == "__main__":
        random = np.random.default_rng(0)
        images = random.integers(0, 256, (16, 8, 8, 3), np.uint8)
        np.savez("set.npz", images=images, labels=random.integers(0, 3, 16))
        run(*TRAIN, 1)
"""


def on_windows(folder, *parts) -> str:
    """What a program prints that is made of these parts; it is a file, as what spawns has to be."""
    program = folder / "program.py"
    program.write_text("\n".join(map(textwrap.dedent, parts)), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, program], cwd=folder, env={**os.environ, **ENVIRONMENT},
        capture_output=True, encoding="cp1252", timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_what_is_pretended(tmp_path):
    """That nothing below works because nothing is in its way."""
    (tmp_path / "held").write_bytes(b"12345678")
    on_windows(
        tmp_path,
        OF_OURS,
        """
        import multiprocessing, os, pytest, numpy as np
        import fcntl  # a stranger may
        for code, error in {
            "import fcntl": ModuleNotFoundError,
            "import os; os.killpg": AttributeError,
            "from signal import alarm": ImportError,
            "import signal; signal.SIGKILL": AttributeError,
            "import subprocess; subprocess.Popen(['true'], start_new_session=True)": ValueError,
            "open('/proc/self/maps')": FileNotFoundError,
            "open('held')": EncodingWarning,
            "import pathlib; pathlib.Path('held').read_text()": EncodingWarning,
        }.items():
            with pytest.raises(error):
                ours(code)
        assert ours("import os")["os"].name == "nt"
        assert multiprocessing.get_start_method() == "spawn"
        mapped = np.memmap("held", mode="r")
        for change in (lambda: os.replace("held", "x"), lambda: os.unlink("held")):
            with pytest.raises(PermissionError):
                change()
        del mapped
        os.replace("held", "x")
        """,
    )


def test_a_run_and_what_is_made_of_it(tmp_path):
    said = on_windows(
        tmp_path,
        TINY,
        """
        model = dx.load("run")  # as in a notebook, while the run goes on
        run(*TRAIN, 2, "--resume", "--keep", 2)
        run(*TRAIN, 3, "--resume", "--keep", 2)
        run("sample", "run", "--per-class", 1, "--steps", 2)
        run("sample", "run", "--count", 3, "--out", "set", "--format", "png", "--steps", 2)
        run("evaluate", "run", "--samples", "set")
        run("export", "run", "--out", "\\u03c0.safetensors")
        run("info")
        assert dx.load("\\u03c0.safetensors").model.n_feat == model.model.n_feat == 8
        assert not [path for path in pathlib.Path("run").rglob("*.tmp")]
        """,
    )
    run = tmp_path / "run"
    assert "state dict  ?.safetensors" in said
    assert "sampler_step\n    cpu             native" in said
    earlier = [path.name for path in sorted(run.glob("checkpoint*"))]
    assert earlier == ["checkpoint-00000004.safetensors", "checkpoint.safetensors"]
    assert [row["step"] for row in read_log(run / "log.csv")] == list("123456")
    assert len(list((tmp_path / "set").rglob("*.png"))) == 3
    assert (run / "evaluation" / "evaluation.json").exists()


def test_bench_and_the_lock_of_a_folder(tmp_path):
    said = on_windows(
        tmp_path,
        TINY,
        """
        if __name__ == "__main__":
            from diffusion_ext.training.folder_lock import FolderLock
            run("bench", "run", "--steps", 2, "--seconds", 1)
            held = FolderLock(pathlib.Path("run"))
            assert main([*TRAIN, "2", "--resume"]) == 2
            held.close()
            run(*TRAIN, 2, "--resume")
        """,
    )
    assert "as fast as eager" in said
    assert "no time was left for it" in said


def test_images_that_spawned_workers_read_and_a_cache_that_is_made_anew(tmp_path):
    on_windows(
        tmp_path,
        """
        import numpy as np
        from pathlib import Path
        from PIL import Image
        from diffusion_ext.training.data import load_image_folder
        from diffusion_ext.training.data.mapped import cached, map_image_array

        def images(data):
            return next(iter(data.read([np.arange(2)])))[0].numpy()

        if __name__ == "__main__":
            stored = np.arange(2 * 8 * 8 * 3, dtype=np.uint8).reshape(2, 8, 8, 3)
            np.save("set.npy", stored)
            read = images(map_image_array("set.npy", workers=1, value_range="0,255"))
            assert (read.transpose(0, 2, 3, 1) == stored).all()
            Path("pictures").mkdir()
            for shade in (10, 20):  # the second time the cache is of other files
                for i in range(2):
                    Image.new("RGB", (8, 8), (shade + i, 0, 0)).save(f"pictures/{i}.png")
                folder = load_image_folder("pictures", 8, lazy=True, workers=0)
                data = cached(folder, "cache.npy", progress=False)
                assert images(data)[:, 0, 0, 0].tolist() == [shade, shade + 1]
                del data  # what is mapped could not be replaced
        """,
    )


def test_what_is_mapped_goes_to_a_worker_by_its_name(tmp_path):
    np.save(tmp_path / "set.npy", np.zeros((100, 16, 16, 3), np.uint8))
    source = map_image_array(tmp_path / "set.npy").source
    packed = pickle.dumps(source)
    assert len(packed) < 1000
    assert pickle.loads(packed).read(99)[0].shape == source.read(99)[0].shape == (3, 16, 16)


def test_a_sharded_checkpoint_may_name_a_path_of_windows():
    reader = sharded_checkpoints._Metadata(io.BytesIO())
    assert reader.find_class("pathlib", "WindowsPath") is pathlib.WindowsPath
    with pytest.raises(pickle.UnpicklingError, match="refused"):
        reader.find_class("pathlib", "Path")


def refusing(times, **attributes):
    """A change of a file that is refused so many times, and how often it was asked for."""
    asked = []

    def change(name):
        asked.append(name)
        if len(asked) <= times:
            error = PermissionError(13, "refused", name)
            vars(error).update(attributes)
            raise error

    return change, asked


def test_whoever_reads_a_file_is_waited_for(monkeypatch):
    change, asked = refusing(2, winerror=32)
    held_files.patiently(change, "name")
    assert asked == ["name"] * 3
    change, asked = refusing(2)  # on Linux it is the folder's rights, which waiting does not change
    with pytest.raises(PermissionError):
        held_files.patiently(change, "name")
    assert asked == ["name"]
    monkeypatch.setattr(held_files, "PATIENCE", 0.1)
    change, asked = refusing(1000, winerror=5)
    with pytest.raises(PermissionError, match="name"):
        held_files.patiently(change, "name")
    assert 1 < len(asked) < 10


@pytest.mark.parametrize("names", [("a", "A"), ("x" * 300, "a")], ids=["alike", "too long"])
def test_names_of_classes_that_cannot_be_folders(tmp_path, monkeypatch, names):
    monkeypatch.setattr(os, "listdir", lambda folder: ["a"])  # "A" is another name of the same
    with pytest.raises(
        ValueError, match=r"format: a class called '(A|x+)' cannot be a folder here"
    ):
        SampleSet(tmp_path / "set", names, True, (0, 1)).begin({})
    SampleSet(tmp_path / "arrays", names, False, (0, 1)).begin({})


def test_msvc_is_given_flags_of_its_own(tmp_path):
    shutil.copy(PACKAGE.parent / "setup.py", tmp_path)  # which writes beside itself
    shutil.copytree(PACKAGE.parent / "csrc", tmp_path / "csrc")
    program = """
import json, runpy, sys, pybind11, setuptools, torch.utils.cpp_extension
setuptools.setup = lambda **arguments: None
sys.platform = "win32"
made = runpy.run_path("setup.py")
print(json.dumps([made["compiler_flags"](), made["NVCC_FLAGS"]]))
"""
    told = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, check=True, stdout=subprocess.PIPE,
        env={**os.environ, "DIFFUSION_EXT_NATIVE": "0"}, encoding="utf-8",
    )  # fmt: skip
    of_cpu, of_cuda = json.loads(told.stdout)
    assert {"/std:c++20", "/fp:precise"} < set(of_cpu)
    assert [flag for flag in of_cpu if not flag.startswith("/")] == []
    assert of_cuda[-2] == "-Xcompiler"
    assert [flag for flag in of_cuda[-1].split(",") if not flag.startswith("/")] == []
    assert "--fmad=false" in of_cuda


def opens_text(call: ast.Call) -> bool:
    """Whether a call reads or writes text and leaves the encoding to the system."""
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    given = {word.arg for word in call.keywords}
    if name in ("read_text", "write_text"):
        return "encoding" not in given
    modes = [a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    binary = any("b" in mode for mode in modes)
    return isinstance(call.func, ast.Name) and name == "open" and not binary | ("encoding" in given)


def test_text_names_its_encoding():
    """ruff's PLW1514 looks only where it sees that a path is one."""
    for path in PACKAGE.rglob("*.py"):
        calls = [n for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.Call)]
        assert [call.lineno for call in calls if opens_text(call)] == [], path
