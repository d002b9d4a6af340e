"""The benchmark of training loops ticks once for each step of ours."""

from benchmarks import training_loops


def test_ours_ticks_at_each_step(monkeypatch):
    monkeypatch.setattr(training_loops, "IMAGES", 64)
    monkeypatch.setitem(training_loops.SIZES, "n_feat", 8)
    ticks = []
    training_loops.by_ours(lambda: ticks.append(1))
    assert len(ticks) == training_loops.EPOCHS * 64 // training_loops.BATCH
