"""Draws on a GPU, whose cumulative sums are taken in parallel and need not rise monotonically."""

import torch

from klq_edu.rlhf.sampling import draw

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_draws_on_a_gpu_are_the_cpus_and_never_impossible():
    rng = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(64, 151_936 if DEVICE == "cuda" else 500, generator=rng)
    probs = logits.masked_fill(torch.rand(logits.shape, generator=rng) < 0.5, -torch.inf).softmax(-1)
    u = torch.rand(64, generator=rng, dtype=torch.float64)
    u[0], u[1] = 0.0, 1 - 2**-53
    drawn = draw(probs.to(DEVICE), u.to(DEVICE))
    assert drawn.device.type == DEVICE and (probs.gather(1, drawn.cpu()[:, None]) > 0).all()
    assert (drawn.cpu() == draw(probs, u)).float().mean() > 0.95  # a last bit may decide
