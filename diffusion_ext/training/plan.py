"""The plan of a run: what its options leave open is chosen from the data, in steps."""

from __future__ import annotations

from dataclasses import replace

from ..checks import counted
from .config import TrainingConfig
from .data import ImageData, LazyData
from .mirrored import looks_the_same_mirrored

EPOCHS, BATCH = 32, 100  # the course's
ENOUGH = 3000  # steps that gave the pictures of docs/getting-started.md
FEW = 1000  # steps after which 200 drawn shapes were blobs still
SMALL = 1000  # images; fewer are a small folder
BATCHES, LEAST_BATCH = 10, 32  # an epoch of a small folder has so many batches, of so many images
N_FEAT, SMALL_N_FEAT = 64, 32
PARTS = 8  # of a run, after each of which there are samples and a checkpoint


def planned(config: TrainingConfig, data: ImageData | LazyData, images: int) -> TrainingConfig:
    """config without a None that is the plan's: `steps` is then the length of the run, and `epochs`
    None.

    Args: images: of the data, those that are trained on. Raises: ValueError for two lengths.
    """
    if config.steps and config.epochs:
        raise ValueError(f"steps: wanted it or epochs, got {config.steps} and {config.epochs}")
    size = config.batch_size
    if size is None:
        batches = -(-images // min(max(images // BATCHES, LEAST_BATCH), BATCH))
        size = -(-images // batches)  # no small one is left over
    per_epoch = steps_per_epoch(replace(config, batch_size=size), images)
    epochs = config.epochs or max(EPOCHS, -(-ENOUGH // per_epoch))
    steps = config.steps or epochs * per_epoch
    config = replace(config, steps=steps, epochs=None, batch_size=size)
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


def n_feat_for(images: int) -> int:
    """Channels of a ContextUnet's first level: half as many, which train in less than half the
    time, gave recognisable pictures of small folders (docs/getting-started.md)."""
    return SMALL_N_FEAT if images < SMALL else N_FEAT


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
    batch, in_epochs = plan.batch_size * plan.accumulate, plan.steps / steps_per_epoch(plan, images)
    steps = counted(plan.steps, "step")
    epochs = "1 epoch" if in_epochs == 1 else f"{in_epochs:.4g} epochs"
    lines = [f"{steps} of {counted(batch, 'image')}, {epochs}"]
    if plan.flip and given.flip is None:
        lines.append("half of the images are mirrored: they look alike; --flip False leaves it out")
    if plan.steps <= FEW:
        lines.append(
            f"{steps} may be too few for pictures that one recognises: those "
            f"of small folders took {ENOUGH}, --steps {ENOUGH}"
        )
    return lines
