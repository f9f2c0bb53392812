import copy

import pytest
import torch
import torch.nn.functional as F

import clipo
from exercises.checking import agree, small_model

B, H, W, SLOTS = 3, 2, 4, 9


def test_decode_steps_equal_a_full_forward_pass(answer):
    q, k, v = torch.randn(3, B, H, SLOTS, W)
    full = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # all tokens at once
    keys, values = 50 * torch.randn(2, B, H, SLOTS, W)  # a used cache: what it held before must not be seen
    position = torch.tensor([0, 2, 5])  # a prompt of each row is in the cache
    for b in range(B):
        keys[b, :, : position[b]], values[b, :, : position[b]] = k[b, :, : position[b]], v[b, :, : position[b]]
    cache = clipo.KVCache(SLOTS)
    cache.layers = [[keys, values]]
    row = torch.arange(B)
    for step in range(3):
        cache.positions = position[:, None]
        new = [part[row, :, position][:, :, None] for part in (q, k, v)]  # (B, H, 1, W)
        expected = full[row, :, position][:, :, None]
        mistakes = wrong_ways(*new, keys.clone(), values.clone(), position)
        got = answer.attend(*new, cache)
        agree(got, expected, f"decode step {step} of rows with {position.tolist()} tokens", mistakes)
        for store, now in zip(cache.layers[0], new[1:], strict=True):
            if not torch.equal(store[row, :, position], now[:, :, 0]):
                pytest.fail("the new key and value are not in the cache, at each row's own slot", pytrace=False)
        position = position + 1


def wrong_ways(q, k, v, keys, values, position):
    row, slot = torch.arange(B), torch.arange(SLOTS)
    before, seen = (  # without the new token, and with it
        torch.where(look, 0.0, -torch.inf)[:, None, None]  # (B, 1, 1, slots)
        for look in (slot < position[:, None], slot <= position[:, None])
    )
    untouched = keys.clone(), values.clone()
    keys[row, :, position], values[row, :, position] = k[:, :, 0], v[:, :, 0]
    scores, old = (q @ stored.transpose(-1, -2) / W**0.5 for stored in (keys, untouched[0]))
    return {
        "it looks at slots that no token of the row is in; mask those beyond its position": scores.softmax(-1) @ values,
        "the scores are not divided by sqrt(W)": (scores * W**0.5 + seen).softmax(-1) @ values,
        "the new token does not look at itself": (old + before).softmax(-1) @ untouched[1],
    }


@torch.no_grad()
def test_the_model_goes_on_as_by_full_forward_passes(answer):
    model, rows = small_model(), [[5, 6, 7], [8], [9, 10, 11, 12]]
    cache = clipo.KVCache(slots=4 + 3)
    clipo.prefill(model, rows, cache)
    for step in range(3):
        expected = torch.stack([model(torch.tensor([ids])).logits[0, -1] for ids in rows])
        token, position = torch.tensor([ids[-1] for ids in rows]), torch.tensor([len(ids) - 1 for ids in rows])
        mistakes = {
            why: clipo.output_logits(model, clipo.last_states(model, token[:, None], wrong[:, None], used)[:, 0])
            for why, wrong, used in (
                ("a token's position is the number of tokens before it", position + 1, copy.deepcopy(cache)),
                ("every row has its own position", position.max().expand(B), copy.deepcopy(cache)),
                ("the tokens before are not seen: use the cache that is given", position, clipo.KVCache(4 + 3)),
            )
        }
        got = answer.decode_step(model, token, position, cache)
        agree(got, expected, f"decode step {step} after prompts of 3, 1 and 4 tokens", mistakes, atol=1e-4)
        rows = [[*ids, logits.argmax().item()] for ids, logits in zip(rows, expected, strict=True)]
