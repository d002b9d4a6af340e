"""The suite's own machinery: a wrong result is never timed, and times are those of the calls."""

import functools
import pathlib
import sys
import time

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # `pytest` alone, unlike `python -m pytest`, leaves it out

from benchmarks import suite, turns, work  # noqa: E402

CASE = work.Case((4, 100))


def doubling(**implementations):
    return work.Work(
        op="double",
        variant="it",
        case=CASE,
        inputs=lambda: (CASE.draw(),),
        implementations=implementations,
        exact=lambda x: 2 * x,
        passes=2,
    )


def noising(sigma, noise):
    def exact(x, draw=None):
        return x + draw(x)

    made = work.formula(lambda x: x + sigma * torch.randn_like(x), noise=noise)
    return work.Work(
        op="noise",
        variant="it",
        case=CASE,
        inputs=lambda: (CASE.draw(),),
        implementations={"eager": made},
        exact=exact,
        passes=2,
        random=True,
    )


def test_a_wrong_result_is_an_error_of_its_row_alone():
    right, wrong = work.formula(lambda x: x + x), work.formula(lambda x: 2.001 * x)
    both = turns.Turns(doubling(right=right, wrong=wrong), ["right", "wrong"], 0.001)
    assert len(both.rounds("right").seconds) >= turns.TURNS
    with pytest.raises(AssertionError, match="above"):
        both.checked("wrong")
    with pytest.raises(AssertionError, match="above"):
        both.rounds("wrong")


def test_a_row_in_a_process_of_its_own():
    (work, _), *_ = suite.rows("philox_normal", quick=True)
    find = functools.partial(suite.find, "philox_normal", work.name, True)
    player = turns.RemotePlayer(find, "eager")
    assert not player.rounds.seconds
    player.play(0.001)
    assert player.rounds.seconds
    player.end()
    assert player.process.exitcode == 0
    with pytest.raises(EOFError):
        turns.RemotePlayer(find, "nobody")


@pytest.mark.parametrize("noise", ["torch", "own"])
def test_noise_of_another_size_is_wrong(noise):
    turns.Turns(noising(1.0, noise), ["eager"], 0.001).checked("eager")
    with pytest.raises(AssertionError):
        turns.Turns(noising(1.5, noise), ["eager"], 0.001).checked("eager")


def test_a_copy_has_to_be_one():
    copy = work.copy_of_x()
    assert turns.Turns(doubling(copy=copy), ["copy"], 0.001).checked("copy")[1] == 0
    wrong = work.Implementation(lambda x: lambda x: x + 1, gives_x=True)
    with pytest.raises(AssertionError, match="not a copy"):
        turns.Turns(doubling(copy=wrong), ["copy"], 0.001).checked("copy")


def test_the_time_is_that_of_a_call():
    def slow(x):
        time.sleep(0.003)
        return 2 * x

    taken = turns.Turns(doubling(slow=work.formula(slow)), ["slow"], 0.001).rounds("slow")
    assert taken.calls == 1
    assert min(taken.seconds) >= 0.003


def test_pytest_benchmark_is_told_of_the_rounds():
    replay = turns.Replay()
    options = replay.of(turns.Rounds(calls=3, seconds=[0.25, 0.5]))
    assert options == {"rounds": 2, "iterations": 3}
    assert [replay() for _ in range(4)] == [0.0, 0.25, 0.0, 0.5]
