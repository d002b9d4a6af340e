"""Pictures of every mode: the right values, or an error that names file and mode."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_ext.app.cli import main
from diffusion_ext.training import load_data

SIZE = 8
RAMP = np.linspace(0, 1, SIZE * SIZE).reshape(SIZE, SIZE)  # in [0, 1]
LEVELS = (255 * RAMP).round().astype(np.uint8)


def loaded(folder, **options):
    """The images of a folder as shares of white, [N, C, S, S]."""
    return (load_data(folder, size=SIZE, **options).images.double() + 1) / 2


def assert_ramp(images, tolerance=0.5 / 255, expected=RAMP):
    for channel in images[0]:
        torch.testing.assert_close(channel, torch.from_numpy(expected), rtol=0, atol=tolerance)


def sixteen_bits(order):
    values = (65535 * RAMP).round().astype(f"{order}u2")
    return Image.frombytes("I;16B" if order == ">" else "I;16", (SIZE, SIZE), values.tobytes())


GREY = Image.fromarray(LEVELS)
MAKERS = {
    "L.png": lambda: GREY,
    "RGB.png": lambda: GREY.convert("RGB"),
    "P.png": lambda: GREY.convert("RGB").quantize(256),
    "P.gif": lambda: GREY.convert("P"),
    "LA.png": lambda: GREY.convert("LA"),
    "RGBA.png": lambda: GREY.convert("RGBA"),
    "CMYK.tif": lambda: GREY.convert("RGB").convert("CMYK"),
    "YCbCr.jpg": lambda: GREY.convert("YCbCr"),
    "I16.png": lambda: sixteen_bits("<"),
    "I16.tif": lambda: sixteen_bits("<"),
    "I16B.tif": lambda: sixteen_bits(">"),
    "F.tif": lambda: Image.fromarray(RAMP.astype(np.float32)),
    "I.tif": lambda: Image.fromarray((65535 * RAMP).astype(np.int32)),
}


@pytest.mark.parametrize("name", MAKERS)
def test_each_mode_has_the_right_values(tmp_path, name):
    MAKERS[name]().save(tmp_path / name, **({"quality": 100} if name.endswith("jpg") else {}))
    images = loaded(tmp_path)
    grey = name[:2] in ("L.", "LA", "I1", "F.", "I.")
    assert images.shape == (1, 1 if grey else 3, SIZE, SIZE)
    loose = {"YCbCr.jpg": 4 / 255, "P.png": 1 / 255}
    fine = {"I16.png": 1e-5, "I16.tif": 1e-5, "I16B.tif": 1e-5, "F.tif": 1e-6, "I.tif": 1e-4}
    assert_ramp(images, (loose | fine).get(name, 0.51 / 255))


def test_two_levels(tmp_path):
    GREY.point(lambda v: 255 * (v > 127), mode="1").save(tmp_path / "1.png")
    assert_ramp(loaded(tmp_path), 0, (LEVELS > 127).astype(np.float64))


def test_numbers_of_a_folder_have_one_range(tmp_path):
    """Dark pictures among bright ones stay dark; of dark ones alone it has to be said."""
    Image.fromarray((0.1 * RAMP).astype(np.float32)).save(tmp_path / "dark.tif")
    with pytest.raises(ValueError, match=r"range: float32 values from 0 to 0.1 do not tell"):
        loaded(tmp_path)
    assert_ramp(loaded(tmp_path, value_range="0,0.1"), 1e-6)
    Image.fromarray(RAMP.astype(np.float32)).save(tmp_path / "light.tif")
    assert_ramp(loaded(tmp_path), 1e-6, 0.1 * RAMP)
    sixteen = tmp_path / "sixteen"
    sixteen.mkdir()
    Image.fromarray((4095 * RAMP).round().astype(np.uint16)).save(sixteen / "camera.png")
    assert_ramp(loaded(sixteen), 1e-5, RAMP / 16.0037)
    assert_ramp(loaded(sixteen, value_range="0,4095"), 2e-4)
    with pytest.raises(ValueError, match=r"camera\.png: range: wanted values from 0 to 255, got"):
        loaded(sixteen, value_range="0,255")


def test_modes_that_are_not_known_are_named(tmp_path, monkeypatch):
    """As LAB to an older Pillow."""
    Image.new("LAB", (SIZE, SIZE)).save(tmp_path / "strange.tif")
    convert = Image.Image.convert

    def refuse(picture, *args, **options):
        if picture.mode == "LAB":
            raise ValueError("conversion not supported")
        return convert(picture, *args, **options)

    monkeypatch.setattr(Image.Image, "convert", refuse)
    with pytest.raises(ValueError, match=r"cannot read the image .*strange\.tif.*mode LAB"):
        loaded(tmp_path)


def transparent(mode):
    """Half of it hidden: red, or grey, beneath."""
    if mode == "LA":
        picture = Image.new("LA", (SIZE, SIZE), (50, 255))
        picture.paste((200, 0), (0, 0, SIZE // 2, SIZE))
    elif mode == "RGBA":
        picture = Image.new("RGBA", (SIZE, SIZE), (50, 50, 50, 255))
        picture.paste((255, 0, 0, 0), (0, 0, SIZE // 2, SIZE))
    elif mode == "P":
        picture = Image.new("P", (SIZE, SIZE), 1)
        picture.putpalette([255, 0, 0, 50, 50, 50])
        picture.paste(0, (0, 0, SIZE // 2, SIZE))
        picture.info["transparency"] = 0
    else:
        picture = Image.new(mode, (SIZE, SIZE), (50, 50, 50) if mode == "RGB" else 50)
        hidden = (255, 0, 0) if mode == "RGB" else 200
        picture.paste(hidden, (0, 0, SIZE // 2, SIZE))
        picture.info["transparency"] = hidden
    return picture


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P", "RGB", "L"])
def test_transparent_pixels_show_the_background(tmp_path, mode):
    picture = transparent(mode)
    known = {"transparency": picture.info["transparency"]} if picture.info else {}
    picture.save(tmp_path / "half.png", **known)
    images = loaded(tmp_path)
    assert images.shape[1] == (1 if mode in ("LA", "L") else 3)
    assert (images[..., :3] == 1).all()
    torch.testing.assert_close(images[0, 0, 0, -1].item(), 50 / 255, rtol=0, atol=1e-6)
    assert (loaded(tmp_path, background="black")[..., :3] == 0).all()
    blue = loaded(tmp_path, background="#0000ff")
    assert blue[0, :, 0, 0].tolist() == [0, 0, 1]
    with pytest.raises(ValueError, match="background: wanted a colour, got 'whitish'"):
        loaded(tmp_path, background="whitish")


def test_half_transparent_pixels_are_mixed(tmp_path):
    Image.new("RGBA", (SIZE, SIZE), (0, 0, 0, 128)).save(tmp_path / "x.png")
    assert loaded(tmp_path).mean().item() == pytest.approx(1 - 128 / 255, abs=0.003)


def test_animations_give_their_first_frame_and_it_is_said(tmp_path):
    first, second = Image.new("L", (SIZE, SIZE), 0), Image.new("L", (SIZE, SIZE), 255)
    for name in ("a.gif", "b.png", "c.webp", "d.tif"):
        options = {"lossless": True} if name == "c.webp" else {}
        first.save(tmp_path / name, save_all=True, append_images=[second], **options)
    data = load_data(tmp_path, size=SIZE)
    assert (data.images == -1).all()
    assert data.notes == ("4 files of several frames (a.gif, ...), the first frame is taken",)


def broken_files(folder):
    GREY.save(folder / "good.png")
    whole = (folder / "good.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.gif").write_text("no picture")
    (folder / "altered.png").write_bytes(whole[:40] + b"\x00" * 20 + whole[60:])


def test_unreadable_files_are_an_error_or_left_out_and_named(tmp_path, capsys):
    broken_files(tmp_path)
    with pytest.raises(ValueError, match=r"data: cannot read the image .*altered\.png"):
        loaded(tmp_path)
    data = load_data(tmp_path, size=SIZE, skip_unreadable=True)
    assert len(data) == 1
    assert data.notes[0] == "4 files left out, which cannot be read:"
    for name in ("cut.png", "empty.jpg", "text.gif", "altered.png"):
        assert any(name in note for note in data.notes[1:])

    options = ["--data", str(tmp_path), "--size", "8", "--n-feat", "8", "--training.epochs", "1"]
    options += ["--out", str(tmp_path / "run")]
    arguments = ["train", *(o.replace("--training.", "--") for o in options)]
    assert main([*arguments, "--strict"]) == 2
    assert "cannot read the image" in capsys.readouterr().err
    assert main([*arguments, "--batch-size", "1"]) == 0
    assert "4 files left out" in capsys.readouterr().out


def test_classes_lose_the_files_that_are_left_out(tmp_path):
    for name in ("cats", "dogs"):
        (tmp_path / name).mkdir()
        GREY.save(tmp_path / name / "1.png")
        GREY.save(tmp_path / name / "2.png")
    (tmp_path / "cats" / "0.png").write_bytes(b"")
    data = load_data(tmp_path, size=SIZE, skip_unreadable=True)
    assert data.contexts.tolist() == [[1, 0], [1, 0], [0, 1], [0, 1]]
    for name in ("1.png", "2.png"):
        (tmp_path / "cats" / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"no images in .*cats(?s:.)*3 files left out"):
        load_data(tmp_path, size=SIZE, skip_unreadable=True)
