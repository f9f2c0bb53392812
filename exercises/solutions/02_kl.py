"""The k3 estimate of the KL divergence."""

from torch import Tensor

SMALLEST_AT: float | None = 0.0
SMALLEST: float | None = 0.0


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log p and log q, both (P, G, T) -> (P, G, T)."""
    d = ref_logprobs - logprobs
    return d.exp() - d - 1
