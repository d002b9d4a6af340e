"""A run that is killed at twenty random moments and resumed each time; run by test_survival.py.

python killed_runs.py FOLDER SEED: prints how far each life came.
"""

import itertools
import os
import random
import signal
import sys
import time
from pathlib import Path

from small_runs import tiny_trainer

from diffusion_ext.training import TrainingConfig, load_checkpoint

KILLS = 20
# A checkpoint after every step: many of the moments lie within the writing of one.
CONFIG = TrainingConfig(
    epochs=40, batch_size=2, checkpoint_minutes=1e-9, log_every=3, validation=0.2, seed=7
)


def train(folder: Path, begun=lambda: None) -> None:
    """begun: called in the first step."""
    run = tiny_trainer(folder, CONFIG)
    update, calls = run.learner.update, itertools.count()

    def tell(*arguments):
        if next(calls) == 0:
            begun()
        return update(*arguments)

    run.learner.update = tell
    run.fit(resume=run.checkpoint_path.exists(), progress=False)


def life(folder: Path, seconds: float) -> None:
    """A process that trains, killed after some seconds of training."""
    reader, writer = os.pipe()
    child = os.fork()  # nothing has used a thread yet
    if not child:
        train(folder, lambda: os.write(writer, b"begun"))
        os._exit(0)
    assert os.read(reader, 5) == b"begun"
    os.close(reader)
    os.close(writer)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the run had ended; it is too short for this test"


def main() -> None:
    folder, moments = Path(sys.argv[1]), random.Random(int(sys.argv[2]))
    for _ in range(KILLS):
        life(folder, moments.uniform(0, 0.08))
        path = folder / "checkpoint.safetensors"
        print(load_checkpoint(path).steps if path.exists() else 0, flush=True)
    train(folder)


if __name__ == "__main__":
    main()
