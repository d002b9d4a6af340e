"""Class labels on a GPU: no wait to look at them, and no image of a label that there is not."""

import pytest
import torch
from harness import EMULATED, waits_are_errors

import diffusion_ext as dx

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a GPU")

X, T = torch.randn(3, 3, 8, 8), torch.rand(3)
LABELS = torch.tensor([4, 0, 2])


@pytest.mark.parametrize("optimized", [False, True])
def test_a_call_waits_for_nothing(optimized):
    model = dx.nn.ContextUnet(3, 8, 5, 8).eval()
    expected = model(X, T, LABELS)
    model = dx.optimize_for_sampling(model.cuda(), 3) if optimized else model.cuda()
    x, t, labels = X.cuda(), T.cuda(), LABELS.cuda()
    model(x, t, labels)  # the first call chooses what later ones keep
    with waits_are_errors():
        ours = model(x, t, labels)
    torch.testing.assert_close(ours.cpu(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("where", ["cpu", "cuda"])
@pytest.mark.parametrize("engine", ["eager", "graph"])
def test_a_sample_by_labels(engine, where):
    model = dx.nn.ContextUnet(3, 8, 5, 8).eval()
    options = {
        "table": dx.ddim(dx.NoiseSchedule.linear(50), 3),
        "shape": X.shape,
        "progress": False,
    }
    expected = dx.sample(model, context=LABELS, **options).images
    ours = dx.sample(model.cuda(), context=LABELS.to(where), engine=engine, **options).images
    torch.testing.assert_close(ours.cpu(), expected, rtol=1e-3, atol=1e-3)


# Not on a real GPU, where a trap ends the process's use of it.
@pytest.mark.skipif(not EMULATED, reason="ends a GPU's context")
@pytest.mark.parametrize("label", [-1, 5])
def test_a_label_out_of_range_gives_no_image(label):
    model = dx.nn.ContextUnet(3, 8, 5, 8).eval().cuda()
    with pytest.raises((IndexError, RuntimeError)):
        model(X.cuda(), T.cuda(), torch.tensor([0, label, 1]).cuda())
