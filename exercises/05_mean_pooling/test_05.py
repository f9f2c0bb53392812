import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import clipo
from exercises.checking import agree


def mistakes(states, mask):
    last = mask.sum(-1) - 1
    return {
        "the padding is counted as states: the sum is right, but it is divided by T": (states * mask[..., None]).mean(
            1
        ),
        "the padding is in the mean": states.mean(1),
        "this is the last token's state only": states[torch.arange(len(states)), last],
    }


def test_pool(answer):
    states = torch.randn(3, 5, 4)
    mask = torch.arange(5) < torch.tensor([[5], [2], [1]])
    expected = torch.stack([row[keep].mean(0) for row, keep in zip(states, mask, strict=True)])
    agree(answer.pool(states, mask), expected, "responses of 5, 2 and 1 tokens", mistakes(states, mask))


def test_what_stands_behind_the_end_does_not_matter(answer):
    states, mask = torch.randn(2, 4, 3), torch.tensor([[True, True, False, False], [True, True, True, True]])
    expected = answer.pool(states, mask)
    states[0, 2:] = torch.inf
    wrong = {"0 times infinity is not 0: take the padding out before you sum": torch.full_like(expected, torch.nan)}
    wrong[next(iter(wrong))][1] = expected[1]
    agree(answer.pool(states, mask), expected, "padding that holds infinities", wrong)


def test_the_rollout_loop_pools_the_same(answer):
    """`generate` adds up the states while it decodes; a forward pass afterwards gives the same mean."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=30, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, bos_token_id=None, initializer_range=0.2,
        )
    ).eval()  # fmt: skip
    rollouts = clipo.generate(model, [[5, 6, 7]], samples_per_prompt=6, max_new_tokens=8, eos_token_id=[1, 2, 3, 4])
    ids = torch.cat([torch.tensor([[5, 6, 7]]).expand(6, -1), rollouts.tokens], dim=1)
    with torch.no_grad():
        states = model.model(input_ids=ids).last_hidden_state[:, 3:]  # (6, T, D), of the response's tokens
    fed_back = torch.arange(rollouts.mask.shape[1]) < rollouts.mask.sum(-1, keepdim=True) - 1  # all but the last token
    longer = fed_back.any(-1)
    got = answer.pool(states[longer], fed_back[longer])
    agree(got, rollouts.hidden[longer], "the states of a real rollout", atol=1e-4)
