"""Names on the command line that are not quite right: one line says what was meant."""

import pytest

from diffusion_ext.app import cli
from diffusion_ext.app.spelling import as_today, check_names
from diffusion_ext.checks import check_choice, did_you_mean


def error_of(capsys, *arguments):
    assert cli.main(list(arguments)) == 2
    message = capsys.readouterr().err
    assert message.startswith("diffusion-ext: ")
    assert message.count("\n") == 1
    return message.removeprefix("diffusion-ext: ").strip()


def test_a_command(capsys):
    names = ("bench", "completion", "demo", "evaluate", "export", "info", "sample", "train")
    assert error_of(capsys, "sampel") == (
        f"command: wanted one of {names}, got 'sampel'; did you mean sample?"
    )
    assert error_of(capsys, "zoom").endswith("got 'zoom'")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sample", "--sampler", "dpmpp2m"), "got 'dpmpp2m'; did you mean dpmpp_2m?"),
        (("evaluate", "--sampler=DDIM"), "got 'DDIM'; did you mean ddim?"),
        (("sample", "--engine", "eagr"), "got 'eagr'; did you mean eager?"),
        (("sample", "--schedule", "cosin"), "got 'cosin'; did you mean cosine?"),
        (("train", "--lr_schedule", "step"), "('constant', 'cosine', 'linear'), got 'step'"),
        (("train", "--layout", "nchw"), "got 'nchw'; did you mean NCHW?"),
        (("train", "--optimizer", "adm"), "got 'adm'; did you mean Adam?"),
        (("bench", "--dtype", "bfloat"), "got 'bfloat'; did you mean bfloat16?"),
    ],
)
def test_a_choice(capsys, monkeypatch, tmp_path, arguments, message):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    assert error_of(capsys, *arguments).endswith(message)


def test_the_samplers_are_listed_in_order(capsys):
    message = error_of(capsys, "sample", "--sampler", "x")
    assert "('ddim', 'ddpm', 'deis', 'dpm2', " in message
    assert "None" not in message


def test_what_is_right_is_left_to_the_parser():
    commands = {"sample": cli.Sample, "train": cli.Train}
    for line in ("sample x --sampler None", "sample --engine", "train --sampler odd", "--help", ""):
        check_names(commands, line.split())


@pytest.mark.parametrize(
    ("before", "today"),
    [
        ("sample --checkpoint runs/a --steps 3", "sample runs/a --steps 3"),
        ("sample --classes a b --checkpoint=runs/a", "sample runs/a --classes a b"),
        ("export --out x.pth --checkpoint runs/a", "export runs/a --out x.pth"),
        ("sample --checkpoint", "sample"),
        ("sample runs/a --out=b=c", "sample runs/a --out=b=c"),
        ("train --checkpoint-every 3", "train --checkpoint-every 3"),
        ("sample --checkpointed 3", "sample --checkpointed 3"),
        ("", ""),
    ],
)
def test_the_option_that_the_run_had(before, today):
    assert as_today(before.split()) == today.split()


@pytest.mark.parametrize(
    ("before", "today"),
    [
        ("train --flip --seed 1", "train --flip True --seed 1"),
        ("train --no-flip", "train --flip False"),
        ("train --flip", "train --flip True"),
        ("train --flip False --seed 1", "train --flip False --seed 1"),
        ("sample --flip", "sample --flip"),
    ],
)
def test_flags_of_before(before, today):
    assert as_today(before.split()) == today.split()


def test_the_nearest_name():
    assert did_you_mean("Cta", ["dog", "cat"]) == "; did you mean cat?"
    assert did_you_mean("photo", {"photos": "runs/photos"}) == "; did you mean runs/photos?"
    assert did_you_mean("zebra", ["dog", "cat"]) == ""
    assert did_you_mean("", []) == ""


def test_choices_of_several_kinds_are_in_order():
    with pytest.raises(
        ValueError, match=r"^x: wanted one of \(1, None, 'a', 'b'\), got 'bb'; did "
    ):
        check_choice("x", "bb", ("b", None, "a", 1))
    with pytest.raises(ValueError, match=r"wanted one of \(1, 2\), got 'a'$"):
        check_choice("x", "a", (2, 1))
