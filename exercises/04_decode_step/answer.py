"""Exercise 4: one decode step with a KV cache (clipo.py, section 1: KVCache, attention_mask, cached_attention).

A new token needs only its own query; keys and values of the tokens before it are in the cache. Rows have different
lengths, so each writes at its own slot, and looks at its own slots only:

    o = softmax( q K^T / sqrt(W) ) V        over the tokens 0 ... length of the row, the new one among them

Check it with: python -m pytest exercises/04_decode_step
"""

from torch import Tensor


def decode_step(query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, length: Tensor) -> Tensor:
    """Attention of one new token per row.

    query, key, value (B, H, W): the new token's. keys, values (B, H, slots, W): the cache, into which the new key and
    value are written. length (B,) long: how many tokens the row had before, which is the new one's slot. Returns
    (B, H, W).
    """
    raise NotImplementedError("write decode_step in exercises/04_decode_step/answer.py; hints.md helps")
