"""Exercise 2: the k3 estimate of the KL divergence (GRPO; clipo.py, section 5).

    KL(p || q) = E_{y ~ p} [ log p(y) - log q(y) ]        of policy p and reference q, and for one sample y

    k3(y) = exp(d) - d - 1,   d = log q(y) - log p(y)

Its mean over samples of p is the KL, as the mean of -d alone is. Why take k3? It is never negative: not for one sample.

Check it with: python -m pytest exercises/02_kl
"""

from torch import Tensor

# At which d is k3 smallest, and how large is it there? (Where is its derivative 0? Is it convex?)
SMALLEST_AT: float | None = None
SMALLEST: float | None = None


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log p and log q of the sampled tokens, both (P, G, T) -> (P, G, T)."""
    raise NotImplementedError("write kl_k3 in exercises/02_kl/answer.py; hints.md helps")
