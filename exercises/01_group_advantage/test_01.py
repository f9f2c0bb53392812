import statistics

import torch

from exercises.checking import agree, call

NEARLY = torch.tensor([[0.0, 1e-6, 2e-6, 5e-6], [0.0, 2e-7, 4e-7, 1e-6]])  # of the size of eps


def expected(rewards, scale_by_std=True, eps=1e-6):
    rows = []
    for row in rewards.tolist():
        mean, spread = statistics.fmean(row), statistics.stdev(row)
        rows.append([(r - mean) / (spread + eps if scale_by_std else 1) for r in row])
    return torch.tensor(rows, dtype=torch.float64)


def mistakes(R, eps=1e-6):
    centred, std = R - R.mean(-1, keepdim=True), R.std(-1, keepdim=True)
    by_G = R.std(-1, unbiased=False, keepdim=True)
    return {
        "the std is divided by G; Bessel's correction divides by G - 1": centred / (by_G + eps),
        "mean and std are over the whole batch; each prompt's group has its own": (R - R.mean()) / (R.std() + eps),
        "mean and std are over the prompts; a group is a row": (R - R.mean(0)) / (R.std(0, unbiased=len(R) > 1) + eps),
        "only the mean is taken off; it is also divided by the std (without is Dr. GRPO)": centred,
        "the mean is not taken off": R / (std + eps),
        "this divides by the variance; its root is the std": centred / (R.var(-1, keepdim=True) + eps),
        **({"eps is taken for 1e-6, whatever is given": centred / (std + 1e-6)} if eps != 1e-6 else {}),
        "it is held between bounds; an advantage has none": (centred / (std + eps)).clamp(-3, 3),
        "eps is missing; it is added to the std": centred / std,
        "eps is inside the root; it is added to the std": centred / (std.square() + eps).sqrt(),
        "eps is the least std here; it is added to the std": centred / std.clamp(min=eps),
    }


def test_group_advantages(answer):
    one_of_many = (torch.arange(64)[None] == 5).float()
    for rewards in (
        torch.tensor([[1.0, 0.0, 0.0, 1.0]]),
        torch.rand(3, 6),
        torch.randint(2, (5, 16)).float(),
        one_of_many,
    ):
        P, G = rewards.shape
        got = call(answer.group_advantages, rewards.clone())
        agree(got, expected(rewards), f"rewards {P} x {G}", mistakes(rewards))


def test_without_the_std_it_is_dr_grpos(answer):
    rewards = torch.rand(3, 6)
    wrong = {"scale_by_std=False must leave the division out": expected(rewards)}
    got = call(answer.group_advantages, rewards, scale_by_std=False)
    agree(got, expected(rewards, scale_by_std=False), "scale_by_std=False", wrong)


def test_rewards_that_are_nearly_equal(answer):
    got = call(answer.group_advantages, NEARLY)
    agree(got, expected(NEARLY), "rewards that differ by some 1e-6", mistakes(NEARLY))


def test_another_eps(answer):
    rewards = torch.rand(3, 6)
    got = call(answer.group_advantages, rewards, eps=0.1)
    agree(got, expected(rewards, eps=0.1), "eps=0.1", mistakes(rewards, 0.1))


def test_a_group_whose_rewards_are_all_equal_has_no_advantage(answer):
    wrong = {"eps is missing: 0 / 0 is no number": torch.full((1, 4), torch.nan)}
    agree(call(answer.group_advantages, torch.ones(1, 4)), torch.zeros(1, 4), "four rewards of 1", wrong)
