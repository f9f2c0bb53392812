import torch

import clipo
from exercises.checking import agree, small_model


def mistakes(states, mask):
    last = (mask.sum(-1) - 1)[..., None, None].expand(*mask.shape[:2], 1, states.shape[-1])
    by_T = (states * mask[..., None]).mean(2)
    return {
        "the padding is counted as states: the sum is right, but it is divided by T": by_T,
        "the padding is in the mean": states.mean(2),
        "this is the last token's state only": states.gather(2, last)[:, :, 0],
    }


def test_pool(answer):
    states = torch.randn(2, 3, 5, 4)
    mask = torch.arange(5) < torch.tensor([[5, 2, 1], [3, 3, 4]])[..., None]
    rows = zip(states.flatten(0, 1), mask.flatten(0, 1), strict=True)
    expected = torch.stack([row[keep].mean(0) for row, keep in rows]).view(2, 3, 4)
    agree(answer.pool(states, mask), expected, "responses of 1 to 5 tokens", mistakes(states, mask))


def test_what_stands_behind_the_end_does_not_matter(answer):
    states, mask = torch.randn(1, 2, 4, 3), torch.tensor([[[True, True, False, False], [True, True, True, True]]])
    expected = answer.pool(states, mask)
    states[0, 0, 2:] = torch.inf
    wrong = {"0 times infinity is not 0: take the padding out before you sum": torch.full_like(expected, torch.nan)}
    wrong[next(iter(wrong))][0, 1] = expected[0, 1]
    agree(answer.pool(states, mask), expected, "padding that holds infinities", wrong)


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
    assert longer.sum() >= 2
    got = answer.pool(states[:, longer], fed_back[:, longer])
    agree(got, rollouts.hidden[:, longer], "the states of a real rollout", atol=1e-4)
