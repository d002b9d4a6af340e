"""The loss curve of a run."""

import pytest
from PIL import Image

from diffusion_ext.app.curves import save_loss_curve


def test_loss_curve(tmp_path):
    pytest.importorskip("matplotlib")
    save_loss_curve(tmp_path / "loss.png", [0.5, 0.3, 0.2])
    with Image.open(tmp_path / "loss.png") as curve:
        assert curve.size == (840, 480)
        assert len(curve.convert("RGB").getcolors(1 << 20)) > 10


def test_missing_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'diffusion_ext\[demo\]'"):
        save_loss_curve(tmp_path / "loss.png", [0.5])


def test_the_loss_on_images_held_out_stands_beside_it(tmp_path):
    pytest.importorskip("matplotlib")
    save_loss_curve(tmp_path / "one.png", [0.5, 0.3, 0.2])
    save_loss_curve(tmp_path / "two.png", [0.5, 0.3, 0.2], [0.6, 0.4, 0.35])
    one, two = ((tmp_path / name).read_bytes() for name in ("one.png", "two.png"))
    orange = (204, 122, 0)
    with Image.open(tmp_path / "two.png") as curve:
        assert orange in {colour for _, colour in curve.convert("RGB").getcolors(1 << 20)}
    assert one != two
