import copy

import torch
import torch.nn.functional as F

import clipo
from exercises.checking import agree, call, small_model, wrong

B, H, W, SLOTS = 3, 2, 4, 9


def used_cache(k, v, position):
    """A cache that holds a prompt of each row, and behind it what it held before, which must not be seen."""
    keys, values = 50 * torch.randn(2, B, H, SLOTS, W)
    for b in range(B):
        keys[b, :, : position[b]], values[b, :, : position[b]] = k[b, :, : position[b]], v[b, :, : position[b]]
    cache = clipo.KVCache(SLOTS)
    cache.layers = [[keys, values]]
    return cache


def decode(answer, q, k, v, steps=3):
    """Decode steps, each against torch's own attention over all tokens at once."""
    full, position, row = (
        F.scaled_dot_product_attention(q, k, v, is_causal=True),
        torch.tensor([0, 2, 5]),
        torch.arange(B),
    )
    cache = used_cache(k, v, position)
    for step in range(steps):
        cache.positions = position[:, None]
        new = [part[row, :, position][:, :, None] for part in (q, k, v)]  # (B, H, 1, W)
        before = [store.clone() for store in cache.layers[0]]
        got = call(answer.attend, *new, cache)
        mistakes = wrong_ways(*new, *before, position)
        given = f"decode step {step} of rows with {position.tolist()} tokens"
        agree(got, full[row, :, position][:, :, None], given, mistakes)
        for store, old, now in zip(cache.layers[0], before, new[1:], strict=True):
            if not torch.equal(store[row, :, position], now[:, :, 0]):
                wrong("the new key and value are not in the cache, at each row's own slot")
            old[row, :, position] = now[:, :, 0]
            if not torch.equal(store, old):
                wrong("other slots of the cache than the new token's are changed; they are not this step's to write")
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
        "the scores are divided by W, not by its root": (scores / W**0.5 + seen).softmax(-1) @ values,
        "the new token does not look at itself": (old + before).softmax(-1) @ untouched[1],
        "masked slots weigh something: a finite score, like -50 or -1e4, is one that others can fall below": (
            scores.masked_fill(seen < 0, -1e4).softmax(-1) @ values
        ),
        "a masked score of 0 is no masked slot: exp(0) is 1": scores.masked_fill(seen < 0, 0).softmax(-1) @ values,
    }


def test_decode_steps_equal_a_full_forward_pass(answer):
    decode(answer, *torch.randn(3, B, H, SLOTS, W))


def test_scores_far_below_0_are_still_the_row_s_own(answer):
    """Queries that point away from all keys of their row: every score is -15,000, and masked ones are lower still."""
    east = torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(B, H, SLOTS, W)
    decode(answer, -3e4 * east, east, torch.randn(B, H, SLOTS, W))


@torch.no_grad()
def test_the_model_goes_on_as_by_full_forward_passes(answer):
    model, rows = small_model(), [[5, 6, 7], [8], [9, 10, 11, 12]]
    cache = clipo.KVCache(slots=4 + 3)
    clipo.prefill(model, rows, cache)
    for step in range(3):
        expected = torch.stack([model(torch.tensor([ids])).logits[0, -1] for ids in rows])
        token, position = torch.tensor([ids[-1] for ids in rows]), torch.tensor([len(ids) - 1 for ids in rows])
        mistakes = {
            why: clipo.output_logits(model, clipo.last_states(model, token[:, None], other[:, None], used)[:, 0])
            for why, other, used in (
                ("a token's position is the number of tokens before it", position + 1, copy.deepcopy(cache)),
                ("every row has its own position", position.max().expand(B), copy.deepcopy(cache)),
                ("the tokens before are not seen: use the cache that is given", position, clipo.KVCache(4 + 3)),
            )
        }
        mistakes["these are log-probs; the logits are asked for"] = expected.log_softmax(-1)
        mistakes["these are probabilities; the logits are asked for"] = expected.softmax(-1)
        got = call(answer.decode_step, model, token, position, cache)
        agree(got, expected, f"decode step {step} after prompts of 3, 1 and 4 tokens", mistakes, atol=1e-4)
        rows = [[*ids, logits.argmax().item()] for ids, logits in zip(rows, expected, strict=True)]
