"""A run that is killed at twenty random moments and resumed each time; run by test_survival.py.

python killed_runs.py FOLDER SEED: prints how far each life came.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

from small_runs import tiny_trainer

from diffusion_ext.training import TrainingConfig, load_checkpoint

KILLS = 20
MOST = 6  # steps of a life
# A checkpoint after every step: many of the moments lie within the writing of one.
CONFIG = TrainingConfig(
    epochs=40, batch_size=2, checkpoint_minutes=1e-9, log_every=3, validation=0.2, seed=7
)


def train(folder: Path, tell=lambda: None) -> None:
    """tell: called at the beginning of each step."""
    run = tiny_trainer(folder, CONFIG)
    update = run.learner.update

    def told(*arguments):
        tell()
        return update(*arguments)

    run.learner.update = told
    run.fit(resume=run.checkpoint_path.exists(), progress=False)


def life(folder: Path, steps: int, seconds: float) -> float:
    """A process that trains, killed some seconds after so many steps have begun; the seconds that a
    step took."""
    reader, writer = os.pipe()
    child = os.fork()  # nothing has used a thread yet
    if not child:
        train(folder, lambda: os.write(writer, b"."))
        os._exit(0)
    begun = []
    for _ in range(steps):
        assert os.read(reader, 1) == b"."
        begun.append(time.perf_counter())
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the run had ended; it is too short for this test"
    os.close(reader)
    os.close(writer)
    return (begun[-1] - begun[0]) / max(steps - 1, 1)


def main() -> None:
    folder, moments = Path(sys.argv[1]), random.Random(int(sys.argv[2]))
    step = life(folder.with_name("measured"), MOST, 0)  # on this machine, as busy as it is
    for _ in range(KILLS):
        life(folder, 1, moments.uniform(0, MOST * step))
        path = folder / "checkpoint.safetensors"
        print(load_checkpoint(path).steps if path.exists() else 0, flush=True)
    train(folder)


if __name__ == "__main__":
    main()
