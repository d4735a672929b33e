"""Draws on a GPU, whose cumulative sums are taken in parallel and need not rise monotonically."""

import torch

from klq_edu.rlhf.sampling import draw


def test_draws_on_a_gpu_are_the_cpus_and_never_impossible():
    rng = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(64, 151_936, generator=rng)
    probs = logits.masked_fill(torch.rand(logits.shape, generator=rng) < 0.5, -torch.inf).softmax(-1)
    u = torch.rand(64, generator=rng, dtype=torch.float64)
    u[0], u[1] = 0.0, 1 - 2**-53
    drawn = draw(probs.cuda(), u.cuda())
    assert drawn.is_cuda and (probs.gather(1, drawn.cpu()[:, None]) > 0).all()
    assert (drawn.cpu() == draw(probs, u)).float().mean() > 0.95  # a last bit may decide
