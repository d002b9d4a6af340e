"""The plan of a run: what its options leave open is chosen from the data, in steps."""

from __future__ import annotations

from dataclasses import replace

from .config import TrainingConfig
from .data import ImageData, LazyData
from .mirrored import looks_the_same_mirrored

EPOCHS, BATCH = 32, 100  # the course's
ENOUGH = 2000  # steps from which small folders gave recognisable pictures, and
FEW = 1000  # those up to which they did not: docs/getting-started.md has the pictures
BATCHES, LEAST_BATCH = 10, 32  # an epoch of a small folder has so many batches, of so many images
PARTS = 8  # of a run, after each of which there are samples and a checkpoint


def planned(config: TrainingConfig, data: ImageData | LazyData, images: int) -> TrainingConfig:
    """config without a None that is the plan's: `steps` is then the length of the run, whatever
    `epochs` says.

    Args: images: of the data, those that are trained on.
    """
    size = config.batch_size or min(max(images // BATCHES, LEAST_BATCH), BATCH, images)
    per_epoch = steps_per_epoch(replace(config, batch_size=size), images)
    epochs = config.epochs or max(EPOCHS, -(-ENOUGH // per_epoch))
    steps = config.steps or epochs * per_epoch
    config = replace(config, steps=steps, batch_size=size)
    part = epochs_of_a_part(config, images, PARTS)
    flip = config.flip
    course = config.noising == "course"
    return replace(
        config,
        prediction=config.prediction or ("epsilon" if course else "v"),
        timestep_sampling=config.timestep_sampling or ("uniform" if course else "logit-normal"),
        checkpoint_every=config.checkpoint_every or part,
        samples_every=part if config.samples_every is None else config.samples_every,
        flip=looks_the_same_mirrored(data) if flip is None else flip,
    )


def epochs_of(config: TrainingConfig, images: int) -> int:
    """Passes over the data that a run of config.steps begins."""
    return -(-config.steps // steps_per_epoch(config, images))


def epochs_of_a_part(config: TrainingConfig, images: int, parts: int) -> int:
    """Whole epochs of a run that is cut into so many parts."""
    return max(epochs_of(config, images) // parts, 1)


def batches_per_epoch(config: TrainingConfig, images: int) -> int:
    return -(-images // config.batch_size)


def steps_per_epoch(config: TrainingConfig, images: int) -> int:
    """Updates of the weights in a pass over the data."""
    return -(-batches_per_epoch(config, images) // config.accumulate)


def plan_in_words(given: TrainingConfig, plan: TrainingConfig, images: int) -> list[str]:
    """What a run is going to do, in lines, with what was planned that was not given."""
    size, in_epochs = plan.batch_size, plan.steps / steps_per_epoch(plan, images)
    lines = [f"{plan.steps} steps of {size * plan.accumulate} images, {in_epochs:.4g} epochs"]
    if plan.flip and given.flip is None:
        lines.append("half of the images are mirrored: they look alike; --flip False leaves it out")
    if plan.steps < ENOUGH:
        lines.append(
            f"{plan.steps} steps are few: small folders gave noise up to {FEW} and recognisable "
            f"pictures from {ENOUGH} on; --steps {ENOUGH}"
        )
    return lines
