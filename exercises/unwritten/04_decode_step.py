"""Exercise 4: one decode step with a KV cache (clipo.py, section 1: KVCache, last_states, prefill, generate).

A new token needs only its own query; keys and values of the tokens before it are in the cache. Rows have different
lengths, so each writes at its own slot (slot = position), and looks at its own slots only:

    o = softmax( q K^T / sqrt(W) ) V        over the slots 0 ... position of the row, the new token's among them

First this attention, of one layer; then the step of a whole model.

Check it with: python -m pytest exercises/04_decode_step
"""

from torch import Tensor

from clipo import KVCache


def attend(query: Tensor, key: Tensor, value: Tensor, cache: KVCache) -> Tensor:
    """Attention of one new token per row, in the first layer.

    query, key, value (B, H, 1, W): the new token's. cache.positions (B, 1) long: its position in each row.
    cache.layers[0]: keys and values, both (B, H, slots, W), into which the new ones are written. Returns (B, H, 1, W).
    """
    raise NotImplementedError("write attend in exercises/04_decode_step/answer.py; hints.md helps")


def decode_step(model, token: Tensor, position: Tensor, cache: KVCache) -> Tensor:
    """Feed each row its last token (B,), which stands at position (B,): the next token's logits (B, V).

    By clipo.last_states and clipo.output_logits.
    """
    raise NotImplementedError("write decode_step in exercises/04_decode_step/answer.py; hints.md helps")
