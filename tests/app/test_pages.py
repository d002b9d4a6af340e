"""The pages hold all they show, and the player's sheet has every frame in its place."""

import base64
import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_ext.app import page
from diffusion_ext.app.player import player
from diffusion_ext.sampling.pictures import to_levels


def about(markup: str) -> dict:
    return json.loads(re.search(r"const about = (.*), sheet = new Image", markup)[1])


def picture(address: str) -> np.ndarray:
    kind, content = address.split(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("number, count, columns", [(1, 1, 1), (5, 6, 3), (7, 5, 3)])
def test_the_sheet_has_every_frame_in_its_place(channels, number, count, columns):
    frames = torch.rand(number, count, channels, 4, 6) * 2 - 1
    told = about(player(frames, range(number, 0, -1), columns))
    sheet = picture(told["sheet"]).reshape(*picture(told["sheet"]).shape[:2], channels)
    rows = -(-count // columns)
    for f, frame in enumerate(frames):
        for i, levels in enumerate(to_levels(frame)):
            # as the page's drawImage finds it
            x = f % told["across"] * columns * 6 + i % columns * 6
            y = f // told["across"] * rows * 4 + i // columns * 4
            assert (sheet[y : y + 4, x : x + 6] == levels).all(), (f, i)
    assert told["timesteps"] == list(range(number, 0, -1))


def test_labels_cannot_end_the_script():
    markup = player(torch.zeros(1, 1, 1, 4, 4), [0], 1, ["</script><b>"])
    assert markup.count("</script>") == 1
    assert about(markup)["labels"] == ["</script><b>"]


def test_a_page_needs_nothing_beside_itself(tmp_path):
    path = tmp_path / "new" / "page.html"
    page.write_page(path, "a < b", player(torch.zeros(2, 1, 1, 4, 4), [1, 0], 1))
    text = path.read_text()
    assert "<title>a &lt; b</title>" in text
    assert "ABOUT" not in text
    assert not re.findall(r"""(?:src|href)\s*=\s*["']?(?!data:)\w""", text.replace("sheet.src", ""))


def test_without_a_browser_the_page_is_named(monkeypatch, capsys, tmp_path):
    opened = []
    monkeypatch.setattr(page.webbrowser, "open", lambda address: opened.append(address) or False)
    page.show(tmp_path / "page.html")
    assert opened == [(tmp_path / "page.html").as_uri()]
    assert f"open {tmp_path / 'page.html'} yourself" in capsys.readouterr().out
