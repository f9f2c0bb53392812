import pytest
import torch
import torch.nn.functional as F

import clipo
from exercises.checking import agree

B, H, W, SLOTS = 3, 2, 4, 9


def test_decode_steps_equal_a_full_forward_pass(answer):
    q, k, v = torch.randn(3, B, H, SLOTS, W)
    full = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # all tokens at once
    keys, values = 50 * torch.randn(2, B, H, SLOTS, W)  # a used cache: what it held before must not be seen
    length = torch.tensor([0, 2, 5])  # a prompt of each row is in the cache
    for b in range(B):
        keys[b, :, : length[b]], values[b, :, : length[b]] = k[b, :, : length[b]], v[b, :, : length[b]]
    row = torch.arange(B)
    for step in range(3):
        new = [part[row, :, length] for part in (q, k, v)]
        expected = full[row, :, length]
        mistakes = wrong_ways(*new, keys.clone(), values.clone(), length)
        got = answer.decode_step(*new, keys, values, length)
        agree(got, expected, f"decode step {step} of rows with {length.tolist()} tokens", mistakes)
        if not torch.equal(keys[row, :, length], new[1]) or not torch.equal(values[row, :, length], new[2]):
            pytest.fail("the new key and value are not in the cache, at each row's own slot", pytrace=False)
        length = length + 1


def wrong_ways(q, k, v, keys, values, length):
    row, slot = torch.arange(B), torch.arange(SLOTS)
    before = torch.where((slot < length[:, None])[:, None], 0.0, -torch.inf)[:, :, None]  # without the new token
    untouched = keys.clone(), values.clone()
    keys[row, :, length], values[row, :, length] = k, v
    scores = torch.einsum("bhw,bhsw->bhs", q, keys)[:, :, None] / W**0.5
    seen = clipo.attention_mask(length[:, None], slot[None], None, torch.float32)

    def attended(scores, values):
        return (scores.softmax(-1) @ values)[:, :, 0]

    old = torch.einsum("bhw,bhsw->bhs", q, untouched[0])[:, :, None] / W**0.5
    return {
        "it looks at slots that no token of the row is in; mask those beyond its length": attended(scores, values),
        "the scores are not divided by sqrt(W)": attended(scores * W**0.5 + seen, values),
        "the new token does not look at itself": attended(old + before, untouched[1]),
    }
