import torch

import clipo
from exercises.checking import agree


def test_group_advantages(answer):
    for rewards in (torch.tensor([[1.0, 0.0, 0.0, 1.0]]), torch.rand(3, 6), torch.randint(2, (5, 16)).float()):
        P, G = rewards.shape
        centred = rewards - rewards.mean(-1, keepdim=True)
        mistakes = {
            "the std is divided by G; Bessel's correction divides by G - 1": centred
            / (rewards.std(-1, unbiased=False, keepdim=True) + 1e-6),
            "mean and std are over the whole batch; each prompt's group has its own": (rewards - rewards.mean())
            / (rewards.std() + 1e-6),
            "only the mean is taken off; it is also divided by the std (without is Dr. GRPO)": centred,
        }
        agree(answer.group_advantages(rewards), clipo.group_advantages(rewards), f"rewards {P} x {G}", mistakes)


def test_without_the_std_it_is_dr_grpos(answer):
    rewards = torch.rand(3, 6)
    expected = clipo.group_advantages(rewards, scale_by_std=False)
    mistakes = {"scale_by_std=False must leave the division out": clipo.group_advantages(rewards)}
    agree(answer.group_advantages(rewards, scale_by_std=False), expected, "scale_by_std=False", mistakes)


def test_a_group_whose_rewards_are_all_equal_has_no_advantage(answer):
    mistakes = {"eps is missing: 0 / 0 is no number": torch.full((1, 4), torch.nan)}
    agree(answer.group_advantages(torch.ones(1, 4)), torch.zeros(1, 4), "four rewards of 1", mistakes)
