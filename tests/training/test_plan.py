"""What a run plans from its data, and what it says of it."""

import dataclasses
import math

import pytest
import torch
from small_runs import SCHEDULE, TinyNetwork, assert_same_run, tiny_data, tiny_trainer

import diffusion_ext as dx
from diffusion_ext.training import ImageData, Trainer, TrainingConfig, load_checkpoint
from diffusion_ext.training.mirrored import looks_the_same_mirrored
from diffusion_ext.training.optimizers import learning_rate
from diffusion_ext.training.plan import ENOUGH, FEW, plan_in_words, planned
from diffusion_ext.training.preview import Preview, roughness


def plan(images, **options):
    data = ImageData(torch.zeros(images, 1, 4, 4))
    return planned(TrainingConfig(**options), data, images)


@pytest.mark.parametrize(
    ("images", "batch", "steps"),
    [
        (1, 1, 3000),  # a step an epoch
        (12, 12, 3000),
        (33, 17, 1500 * 2),  # no batch of one is left over
        (200, 29, 429 * 7),  # whole epochs
        (450, 45, 300 * 10),
        (999, 91, 273 * 11),
        (1797, 100, 167 * 18),
        (60_000, 100, 32 * 600),  # the course's 32 epochs
    ],
)
def test_the_length_of_a_run(images, batch, steps):
    found = plan(images)
    assert (found.batch_size, found.steps) == (batch, steps)
    assert found.epochs is None
    assert found.checkpoint_every == found.samples_every
    per_epoch = -(-images // batch)
    parts = found.steps / per_epoch / found.checkpoint_every
    assert 8 <= parts < 9


def test_what_is_given_stays():
    found = plan(200, epochs=3, batch_size=50, checkpoint_every=2, samples_every=0, flip=True)
    assert (found.steps, found.epochs, found.batch_size) == (12, None, 50)
    assert (found.checkpoint_every, found.samples_every, found.flip) == (2, 0, True)
    assert plan(200, steps=11, batch_size=50, accumulate=2).steps == 11
    assert plan(200, epochs=3, batch_size=50, accumulate=3).steps == 6  # 4 batches are 2 steps
    with pytest.raises(ValueError, match="steps: wanted it or epochs, got 5 and 3"):
        plan(200, epochs=3, steps=5)
    again = plan(200, epochs=3)
    assert planned(again, ImageData(torch.zeros(200, 1, 4, 4)), 200) == again


def test_what_the_network_predicts():
    assert plan(20).prediction == "epsilon"
    assert plan(20, prediction=None).prediction == "v"
    assert plan(20, prediction=None, noising="course").prediction == "epsilon"


def test_the_plan_in_words():
    given = TrainingConfig()
    lines = plan_in_words(given, dataclasses.replace(plan(200), flip=True), 200)
    assert lines[0] == "3003 steps of 29 images, 429 epochs"
    assert "mirrored" in lines[1]
    assert len(lines) == 2
    lines = plan_in_words(given, plan(200, steps=100, flip=False), 200)
    assert lines[0] == "100 steps of 29 images, 14.29 epochs"
    assert lines[1].startswith("100 steps may be too few ")
    assert lines[1].endswith(f"--steps {ENOUGH}")
    assert len(plan_in_words(given, plan(200, steps=FEW + 1, flip=False), 200)) == 1


def test_a_run_ends_at_its_last_step_and_goes_on_from_there(tmp_path):
    """10 images in batches of 4: three steps an epoch."""
    options = {"batch_size": 4, "seed": 7, "lr_schedule": "constant", "validation": 0.2}
    whole = tiny_trainer(tmp_path / "whole", TrainingConfig(steps=8, **options))
    whole.fit(progress=False)
    assert (whole.steps, whole.epoch, len(whole.losses)) == (8, 4, 4)

    short = tiny_trainer(tmp_path / "parts", TrainingConfig(steps=5, **options))
    short.fit(progress=False)
    assert (short.steps, short.epoch, short.progress.batches) == (5, 2, 1)
    assert load_checkpoint(short.checkpoint_path).steps == 5
    assert [p.name for p in (tmp_path / "parts" / "samples").iterdir()].count("step-000005.png")

    longer = tiny_trainer(tmp_path / "parts", TrainingConfig(steps=8, **options))
    longer.fit(resume=True, progress=False)
    assert_same_run(whole, longer)


def test_the_learning_rate_of_a_run_that_ends_within_an_epoch():
    """It falls by the step; by the epoch, as the course's, in one of whole epochs."""
    whole, short = plan(400, steps=8, batch_size=100), plan(400, steps=2, batch_size=100)
    rates = [learning_rate(whole, step, 4) for step in range(8)]
    assert rates == pytest.approx([1e-3] * 4 + [0.5e-3] * 4)
    assert [learning_rate(short, step, 4) for step in range(2)] == pytest.approx([1e-3, 0.5e-3])


def test_a_last_step_that_is_skipped_costs_nothing(tmp_path, monkeypatch):
    run = tiny_trainer(tmp_path, TrainingConfig(steps=4, batch_size=4, skip_bad_steps=True))
    noised = run.learner.objective.noised

    def bad_in_the_last(x0, t, seeds):
        x_t = noised(x0, t, seeds)
        return x_t * torch.nan if run.steps == 3 else x_t

    monkeypatch.setattr(run.learner.objective, "noised", bad_in_the_last)
    run.fit(progress=False)
    assert (run.steps, run.progress.skipped) == (4, 1)
    assert load_checkpoint(run.checkpoint_path).steps == 4


def test_the_best_checkpoint_stays_known(tmp_path, monkeypatch):
    """Whatever is measured, and however often checkpoints come after a resumption."""

    def fit(steps, every, losses, **resume):
        config = TrainingConfig(
            steps=steps, batch_size=10, checkpoint_every=every, validation=0.2, samples_every=0
        )
        run = tiny_trainer(tmp_path, config)
        left = iter(losses)
        monkeypatch.setattr(run.validation, "loss", lambda *_: next(left))
        run.fit(progress=False, **resume)
        return load_checkpoint(tmp_path / "best.safetensors").steps

    assert fit(2, 1, [0.5, 0.6]) == 1
    assert fit(5, 4, [0.1, 0.55, 0.4], resume=True) == 5  # of step 3 there was no checkpoint
    assert fit(6, 1, [0.45], resume=True) == 5


def test_a_run_shorter_than_an_epoch(tmp_path):
    run = tiny_trainer(tmp_path, TrainingConfig(steps=1, batch_size=4))
    assert run.fit(progress=False) == []
    assert load_checkpoint(run.checkpoint_path).epoch_batches == 1


def test_many_short_epochs_are_not_all_validated(tmp_path):
    options = TrainingConfig(epochs=80, batch_size=8, validation=0.2, samples_every=0)
    run = tiny_trainer(tmp_path, options)
    run.fit(progress=False)
    measured = [i for i, loss in enumerate(run.validation_losses, 1) if not math.isnan(loss)]
    assert measured == list(range(2, 81, 2))
    assert len(run.losses) == len(run.validation_losses) == 80


def test_checkpoint_minutes_count_over_short_epochs(tmp_path, monkeypatch):
    run = tiny_trainer(
        tmp_path,
        TrainingConfig(epochs=30, batch_size=10, checkpoint_every=30, checkpoint_minutes=1e-9),
    )
    saved = []
    monkeypatch.setattr(run.folder, "save", lambda c, best=False: saved.append(c.steps))
    run.fit(progress=False)
    assert saved == [*range(1, 31), 30]


def test_the_lines_of_a_run(tmp_path, capsys):
    run = tiny_trainer(tmp_path, TrainingConfig(steps=16, batch_size=10, samples_every=8))
    run.fit()
    lines = [line for line in capsys.readouterr().out.splitlines() if " to go" not in line]
    assert [line.split("  loss")[0] for line in lines] == [
        f"step {i:2}/16" for i in range(2, 17, 2)
    ]
    told = [line.split("  samples ")[1].split("  ")[0] for line in lines if "samples" in line]
    assert len(told) == 2
    assert all(words.endswith("% noise") for words in told)


def test_how_long_it_will_take_is_said_after_the_first_steps(tmp_path, monkeypatch, capsys):
    from diffusion_ext.training import reporting

    monkeypatch.setattr(reporting, "TIMED", (3, 0.0))
    tiny_trainer(tmp_path, TrainingConfig(steps=20, batch_size=10)).fit()
    lines = [line for line in capsys.readouterr().out.splitlines() if " to go" in line]
    assert len(lines) == 1
    assert lines[0].startswith("about 00:")
    assert lines[0].endswith("s a step")


def test_roughness_tells_noise_from_pictures():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(50, 3, 16, 16, generator=generator)
    assert roughness(noise) == pytest.approx(1, abs=0.02)
    ramp = torch.linspace(-1, 1, 16).expand(2, 1, 16, 16)
    assert roughness(ramp) == pytest.approx((2 / 15) ** 2 / 4 / ramp.var(correction=0).item())
    assert roughness(torch.ones(2, 1, 8, 8)) == 0


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_how_much_of_a_picture_is_noise(share):
    """Noise of so much of the variance is that much of the roughness."""
    generator = torch.Generator().manual_seed(0)
    ramp = torch.linspace(-0.5, 0.5, 16).expand(40, 1, 16, 16)
    preview = Preview(TrainingConfig(), SCHEDULE, ImageData(ramp))
    noise = torch.randn(40, 1, 16, 16, generator=generator) * ramp.std()
    mixed = ramp * (1 - share) ** 0.5 + noise * share**0.5
    assert preview.noise_in(mixed) == pytest.approx(share, abs=0.02)


def test_noise_is_what_an_untrained_network_draws(tmp_path):
    smooth = torch.linspace(-1, 1, 8).expand(60, 1, 8, 8).contiguous()
    run = Trainer(
        dx.nn.ContextUnet(1, 8, 1, 8), SCHEDULE, ImageData(smooth), tmp_path, TrainingConfig()
    )
    assert run.preview.noise_in(run.preview.samples(run.ema_model, run.device)) > 0.5


def clouds(lean, count=200):
    """Smooth random images [N, 1, 16, 16], lighter towards the right by `lean`."""
    random = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 1, 4, 4, generator=random) - 0.5
    smooth = torch.nn.functional.interpolate(coarse, size=16, mode="bilinear")
    return smooth + lean * torch.linspace(-0.5, 0.5, 16)


def test_flips_where_mirrored_images_look_alike(tmp_path):
    assert looks_the_same_mirrored(ImageData(clouds(0)))
    assert not looks_the_same_mirrored(ImageData(clouds(1)))
    assert not looks_the_same_mirrored(ImageData(clouds(0, 20)))  # too few to tell
    assert not looks_the_same_mirrored(ImageData(clouds(0), torch.arange(200)))  # each alone
    mirrored = torch.cat([clouds(1), clouds(1).flip(3)])
    assert looks_the_same_mirrored(ImageData(mirrored))
    sides = torch.arange(400) // 200  # left and right are the classes
    assert not looks_the_same_mirrored(ImageData(mirrored, sides))
    run = Trainer(TinyNetwork(), SCHEDULE, tiny_data(), tmp_path, TrainingConfig(epochs=1))
    assert run.config.flip is False
