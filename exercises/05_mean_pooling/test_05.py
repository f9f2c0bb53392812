import torch

import clipo
from exercises.checking import agree, call, gradient, small_model


def mistakes(states, mask):
    last = (mask.sum(-1) - 1)[..., None, None].expand(*mask.shape[:2], 1, states.shape[-1])
    kept = states.masked_fill(~mask[..., None], 0)
    return {
        "the padding is counted as states: the sum is right, but it is divided by T": kept.mean(2),
        "the padding is in the mean": states.mean(2),
        "this is the last token's state only": states.gather(2, last)[:, :, 0],
        "this is the first token's state only": states[:, :, 0],
        "this is the sum; divide by the number of tokens": kept.sum(2),
        "all are divided by the same number; each response has its own length": kept.sum(2) / mask.sum(-1).max(),
        "the last token is left out": (kept.sum(2) - states.gather(2, last)[:, :, 0])
        / (mask.sum(-1, keepdim=True) - 1).clamp(min=1),
        "0 times infinity is not 0: take the padding out before you sum": torch.where(
            (states.isinf() | states.isnan()).any(2), torch.nan, means(states, mask).float()
        ),
    }


def means(states, mask):
    """Row by row."""
    rows = zip(states.double().flatten(0, 1), mask.flatten(0, 1), strict=True)
    return torch.stack([row[keep].mean(0) for row, keep in rows]).view(*mask.shape[:2], -1)


def test_pool(answer):
    states = torch.randn(2, 3, 6, 4)
    mask = torch.arange(6) < torch.tensor([[5, 2, 1], [3, 3, 4]])[..., None]
    agree(
        call(answer.pool, states, mask),
        means(states, mask),
        "responses of 1 to 5 tokens, T = 6",
        mistakes(states, mask),
    )


def test_what_stands_behind_the_end_does_not_matter(answer):
    for padding in (torch.inf, torch.nan):
        states, mask = torch.randn(1, 2, 4, 3), torch.tensor([[[True, True, False, False], [True, True, True, True]]])
        states[0, 0, 2:] = padding
        given = f"padding that holds {'infinities' if padding == torch.inf else 'NaN'}"
        agree(call(answer.pool, states, mask), means(states, mask), given, mistakes(states, mask))


def test_it_has_the_gradient_of_a_mean(answer):
    states = torch.randn(2, 3, 6, 4, requires_grad=True)
    mask = torch.arange(6) < torch.tensor([[5, 2, 1], [3, 3, 4]])[..., None]
    got = gradient(answer.pool(states, mask), states, "states")
    expected = (mask.double() / mask.sum(-1, keepdim=True))[..., None].expand_as(states)
    agree(got, expected, "the gradient of h with respect to states: 1 / length for a response's tokens, 0 for padding")


def test_the_rollout_loop_pools_the_same(answer):
    """`generate` adds up the states while it decodes; a forward pass afterwards gives the same mean.

    But for the last token: it is drawn and not fed back, so its state is in no mean of `generate`.
    """
    model = small_model()
    rollouts = clipo.generate(model, [[5, 6, 7]], samples_per_prompt=6, max_new_tokens=8, eos_token_id=[1, 2, 3, 4])
    ids = torch.cat([torch.tensor([[5, 6, 7]]).expand(6, -1), rollouts.tokens[0]], dim=1)
    with torch.no_grad():
        states = model.model(input_ids=ids).last_hidden_state[None, :, 3:]  # (1, 6, T, D), of the response's tokens
    fed_back = torch.arange(rollouts.mask.shape[2]) < rollouts.mask.sum(-1, keepdim=True) - 1  # (1, 6, T)
    longer = fed_back[0].any(-1)  # of one token nothing is fed back
    got = answer.pool(states[:, longer], fed_back[:, longer])
    agree(got, rollouts.hidden[:, longer], "the states of a real rollout", atol=1e-4)
