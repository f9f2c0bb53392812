"""The warm start's optimiser against the singular values it is about, and against torch's."""

import pytest
import torch

from run.warm_start import NEWTON_SCHULZ, Muon, orthogonal


@pytest.mark.parametrize("shape", [(3, 6, 10), (2, 10, 6), (1, 7, 7)])
def test_only_the_singular_values_change_and_as_the_polynomial_says(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, vt = torch.linalg.svd(matrices, full_matrices=False)
    s = s / s.norm(dim=-1, keepdim=True)
    a, b, c = NEWTON_SCHULZ
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    assert torch.allclose(orthogonal(matrices), u * s[:, None] @ vt, rtol=0, atol=1e-9)
    assert 0.6 < s.min() and s.max() < 1.3


def test_steps_are_those_of_torch_up_to_its_bfloat16():
    generator = torch.Generator().manual_seed(1)
    begin = [torch.randn(shape, generator=generator) for shape in ((8, 12), (12, 8), (8, 12))]
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in begin] for _ in range(2))
    a = Muon(ours, lr=0.1)
    b = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q, start in zip(ours, theirs, begin, strict=True):
        assert (p - q).norm() < 0.02 * (q - start).norm()
