"""The exercises' checks: references pass, and so do other right ways. Unwritten, broken and typical wrong answers fail,
with a message that helps, and that shows neither the check's source nor the solution's."""

import ast
import doctest
import os
import re
import shlex
from pathlib import Path

import processes
import pytest
from conftest import ROOT

from exercises import checking

FOLDER = ROOT / "exercises"
NAMES = sorted(folder.name for folder in FOLDER.iterdir() if folder.name[:2].isdigit())

# ----------------------------------------------------------------------------------------------------
# Right answers with a hole, for the mistakes
# ----------------------------------------------------------------------------------------------------

ADVANTAGES = (
    "def group_advantages(r, *, scale_by_std=True, eps=1e-6):\n"
    "    c, std = r - r.mean(-1, keepdim=True), r.std(-1, keepdim=True)\n"
    "    return {} if scale_by_std else c"
)
K3 = "SMALLEST = SMALLEST_AT = 0.0\ndef kl_k3(p, q):\n    d = q - p\n    return {}"
CLIPPED = (
    "def clipped_surrogate(log_ratio, A, mask, low, high):\n    rho = log_ratio.exp()\n    return {surrogate}, {where}"
)
SURROGATE = "torch.minimum(rho * A, rho.clamp(1 - low, 1 + high) * A)"
WHERE = "((rho > 1 + high) & (A > 0)) | ((rho < 1 - low) & (A < 0))"
ATTEND = (
    "def attend(q, k, v, cache):\n    keys, values = cache.update(k, v, 0)\n"
    "    hidden = (torch.arange(cache.slots) > cache.positions)[:, None, None]\n"
    "    s = q @ keys.mT / q.shape[-1] ** 0.5\n    {}"
)
SEEN = "s.masked_fill(hidden, -torch.inf).softmax(-1)"
DECODE = (
    "def decode_step(model, token, position, cache):\n"
    "    states = clipo.last_states(model, token[:, None], {at}, {cache})\n"
    "    return {logits}"
)
LOGITS = "clipo.output_logits(model, states[:, 0])"
POOL = "def pool(states, mask):\n    kept = states.masked_fill(~mask[..., None], 0)\n    {}"
INFONCE = (
    "def infonce(z, pairs, tau=0.05):\n    s, me = z @ z.mT / tau, torch.eye(z.shape[1]).bool()\n"
    "    L = ({among}).logsumexp(-1) - {pull}\n    return torch.where(pairs.anchor, L, 0.0)\n"
    "chance_level = lambda G: {chance}\nfloor = lambda n: {floor}"
)
SIX = dict(
    among="s.masked_fill(me, -torch.inf)", pull="(s * pairs.target).sum(-1)", chance="math.log(G - 1)",
    floor="math.log(n - 1)",
)  # fmt: skip
REWARD = (
    "PREDICTION, WEIGHT, EXPLANATION = {guess}, {weight}, {letter}\n"
    "largest_group = lambda weight=0.2, floor=-0.5: {largest}\n"
    "def contrastive_reward(L, pairs, *, weight=0.2, floor=-0.5):\n    {paid}"
)
SEVEN = dict(
    guess="0.5", weight="0.1", letter="'c'", largest="math.ceil(math.exp(-floor / weight))",
    paid="return torch.where(pairs.anchor, (-weight * L).clamp(min=floor), 0.0)",
)  # fmt: skip
SIZE = (
    "PREDICTION, SIZE, EXPLANATION = {guess}, {size}, {letter}\ndef mean_size(size, scale_by_std):\n"
    "    R = 1 + size * torch.randn(1, 16, generator=torch.Generator().manual_seed(0))\n"
    "    A = clipo.group_advantages(R, scale_by_std=scale_by_std)\n    return {mean}"
)
EIGHT = dict(guess="0.5", size="1e-6", letter="'a'", mean="A.abs().mean().item()")
FARM = "PREDICTION, CLAUSES, EXPLANATION = {guess}, {clauses}, {letter}\nfarmed_response = lambda q: {text}"
NINE = dict(guess="0.5", clauses="4", letter="'b'", text="'Ann says ' + q.split()[-1]")
MINE = (
    "import variants\nimport torch.nn.functional as F\ndef my_loss(z, pairs, tau=0.05):\n"
    "    s = clipo.similarities(z, tau)\n"
    "    pos, neg = pairs.positive.sum(-1), pairs.negative.sum(-1)\n"
    "    mean = (s * pairs.positive).sum(-1) / pos.clamp(min=1)\n"
    "    return torch.where(pairs.anchor, {loss}, 0.0)\n"
    "my_chance = lambda positives, negatives: {chance}\n"
    "MINE = variants.ContrastiveLoss(my_loss, my_chance)"
)
TWO = (
    "PREDICTION = {guess}\nSHARED, EXPLANATION = {shared}, {letter}\ncentred = lambda h: {centred}\n"
    "chance_level = lambda positives, negatives: {chance}\n"
    "def reward(L, chance, anchor, *, weight=1.0, floor=-0.9, ceiling=1.0):\n    {paid}"
)
ELEVEN = dict(
    guess="{'centring alone': 0.1, 'chance alone': 0.1, 'both': 0.1}", shared="2.0", letter="'d'",
    centred="h - h.mean(1, keepdim=True)", chance="(1 + negatives).log()",
    paid="return torch.where(anchor, (weight * (chance - L)).clamp(floor, ceiling), 0.0)",
)  # fmt: skip


def six(**hole):
    return INFONCE.format(**(SIX | hole))


def seven(**hole):
    return REWARD.format(**(SEVEN | hole))


def eight(**hole):
    return SIZE.format(**(EIGHT | hole))


def nine(**hole):
    return FARM.format(**(NINE | hole))


def ten(loss, chance="0 * positives"):
    return MINE.format(loss=loss, chance=chance)


def eleven(**hole):
    return TWO.format(**(ELEVEN | hole))


def three(surrogate=SURROGATE, where=WHERE):
    return CLIPPED.format(surrogate=surrogate, where=where)


def attend(last, source=ATTEND):
    return source.format(last if "return" in last else f"return {last}")


def decode(at="position[:, None]", cache="cache", logits=LOGITS):
    return DECODE.format(at=at, cache=cache, logits=logits)


# ----------------------------------------------------------------------------------------------------
# The mistakes: exercise: {its name: (the answer, words of what it is told)}
# ----------------------------------------------------------------------------------------------------

HARDEST = "s.masked_fill(~pairs.negative, -math.inf).max(-1).values.where(pairs.anchor, 0.0)"
FARTHEST = "s.masked_fill(~pairs.positive, math.inf).min(-1).values.where(pairs.anchor, 0.0)"
OTHERS = "pairs.positive | pairs.negative"
DRAWN = "(s * pairs.target).sum(-1)"

WRONG = {
    "01_group_advantage": {
        "std divided by G": (ADVANTAGES.format("c / (r.std(-1, keepdim=True, unbiased=False) + eps)"),
                             "Bessel's correction divides by G - 1"),
        "over the whole batch": ("def group_advantages(r, *, scale_by_std=True, eps=1e-6):\n"
                                 "    return (r - r.mean()) / (r.std() + eps)", "each prompt's group has its own"),
        "over the prompts": ("def group_advantages(r, *, scale_by_std=True, eps=1e-6):\n"
                             "    return (r - r.mean(0)) / (r.std(0, unbiased=len(r) > 1) + eps)", "a group is a row"),
        "no eps": (ADVANTAGES.format("c / std"), "eps is missing: 0 / 0"),
        "no eps, nan_to_num": (ADVANTAGES.format("(c / std).nan_to_num()"), "eps is missing; it is added to the std"),
        "eps inside the root": (ADVANTAGES.format("c / (std.square() + eps).sqrt()"), "eps is inside the root"),
        "eps as the least std": (ADVANTAGES.format("c / std.clamp(min=eps)"), "eps is the least std here"),
        "eps hard-coded": (ADVANTAGES.format("c / (std + 1e-6)"), "eps is taken for 1e-6"),
        "held within 3": (ADVANTAGES.format("(c / (std + eps)).clamp(-3, 3)"), "held between bounds"),
        "variance": (ADVANTAGES.format("c / (r.var(-1, keepdim=True) + eps)"), "divides by the variance"),
        "mean not taken off": (ADVANTAGES.format("r / (std + eps)"), "the mean is not taken off"),
        "scale_by_std ignored": (ADVANTAGES.replace(" if scale_by_std else c", "").format("c / (std + eps)"),
                                 "scale_by_std=False must leave the division out"),
        "never divided": (ADVANTAGES.format("c"), "only the mean is taken off"),
        "rewards changed in place": ("def group_advantages(r, *, scale_by_std=True, eps=1e-6):\n"
                                     "    r -= r.mean(-1, keepdim=True)\n"
                                     "    return r / (r.std(-1, keepdim=True) + eps) if scale_by_std else r",
                                     "changes its argument r"),
        "no return": ("def group_advantages(r, *, scale_by_std=True, eps=1e-6):\n    r - r.mean(-1, keepdim=True)",
                      "is a return missing?"),
        "one number a group": (ADVANTAGES.format("(c / (std + eps)).mean(-1)"), "got a tensor of shape (1,)"),
        "no argument eps": ("def group_advantages(r, *, scale_by_std=True):\n    return r",
                            "keep the arguments that its first line had"),
        "another name": ("def advantages(r):\n    return r", "has no group_advantages"),
    },
    "02_kl": {
        "ratio upside down": (K3.format("(-d).exp() + d - 1"), "upside down"),
        "k1": (K3.format("-d"), "this is k1"),
        "k2": (K3.format("d.square() / 2"), "this is k2"),
        "without -1": (K3.format("d.exp() - d"), "the last term, -1, is missing"),
        "without -d": (K3.format("d.exp() - 1"), "the term -d is missing"),
        "d within 5": (K3.format("d.clamp(-5, 5).exp() - d.clamp(-5, 5) - 1"), "held between -5 and 5"),
        "d within 20": (K3.format("d.clamp(-20, 20).exp() - d.clamp(-20, 20) - 1"), "held between -20 and 20"),
        "policy detached": (K3.replace("q - p", "q - p.detach()").format("d.exp() - d - 1"),
                            "no gradient reaches logprobs"),
        "exp detached": (K3.format("d.exp().detach() - d - 1"), "only -d has a gradient"),
        "-d detached": (K3.format("d.exp() - d.detach() - 1"), "only exp(d) has a gradient"),
        "no_grad": (K3.replace("def kl_k3", "@torch.no_grad()\ndef kl_k3").format("d.exp() - d - 1"),
                    "no gradient reaches"),
        "q changed in place": ("SMALLEST = SMALLEST_AT = 0.0\ndef kl_k3(p, q):\n    q -= p\n    return q.exp() - q - 1",
                               "changes its argument q"),
        "mean": (K3.format("(d.exp() - d - 1).mean()"), "got a tensor of shape ()"),
        "SMALLEST_AT 1": (K3.replace("= 0.0\n", "= 0.0\nSMALLEST_AT = 1.0\n", 1).format("d.exp() - d - 1"),
                          "SMALLEST_AT is 1.0; set the derivative"),
        "SMALLEST a text": (K3.replace("= 0.0\n", "= 0.0\nSMALLEST = '0'\n", 1).format("d.exp() - d - 1"),
                            "SMALLEST is '0'; expected a number"),
    },
    "03_clipped_ratio": {
        "clipped term only": (three("rho.clamp(1 - low, 1 + high) * A"), "min keeps the other one"),
        "max": (three(SURROGATE.replace("minimum", "maximum")), "max instead of min"),
        "not clipped": (three("rho * A"), "nothing is clipped"),
        "log rho for rho": (CLIPPED.replace(".exp()", "").format(surrogate=SURROGATE, where=WHERE),
                            "log rho is taken for rho"),
        "detached": (three(f"{SURROGATE}.detach()"), "no gradient reaches log_ratio"),
        "ratio detached in one term": (three(SURROGATE.replace("(rho * A", "(rho.detach() * A")), "the gradient of J"),
        "0.8 and 1.3 hard-coded": (three(SURROGATE.replace("1 - low, 1 + high", "0.8, 1.3")),
                                   "take low and high as given"),
        "0.8 and 1.3 hard-coded in where": (three(where=WHERE.replace("1 + high", "1.3").replace("1 - low", "0.8")),
                                            "take low and high as given"),
        "low and high exchanged": (three(SURROGATE.replace("1 - low, 1 + high", "1 - high, 1 + low")),
                                   "low and high are exchanged"),
        "low on both sides": (three(SURROGATE.replace("high", "low")), "the range is 1 - low to 1 + low"),
        "where: all outside": (three(where="(rho > 1 + high) | (rho < 1 - low)"),
                               "a bad answer that became likelier must still be pushed back"),
        "where: those with a gradient": (three(where=f"~({WHERE})"), "the tokens that do have a gradient"),
        "where: sign of A turned": (three(where="((rho > 1 + high) & (A < 0)) | ((rho < 1 - low) & (A > 0))"),
                                    "the other way round"),
        "where: float": (three(where=f"({WHERE}).float()"), "expected True and False (bool)"),
        "where: >=": (three(where=WHERE.replace("rho > ", "rho >= ").replace("rho < ", "rho <= ")),
                      "exactly on the border nothing is cut off"),
        "where: A >= 0": (three(where=WHERE.replace("A > 0", "A >= 0")), "there is no gradient to remove"),
        "one tensor": ("def clipped_surrogate(log_ratio, A, mask, low, high):\n    return log_ratio.exp() * A",
                       "expected two tensors"),
        "log_ratio changed in place": (CLIPPED.replace(".exp()", ".exp_()").format(surrogate=SURROGATE, where=WHERE),
                                       "changes its argument log_ratio"),
    },
    "04_decode_step": {
        "no mask": (attend("s.softmax(-1) @ values"), "slots that no token of the row is in"),
        "not divided": (attend(f"{SEEN} @ values", ATTEND.replace(" / q.shape[-1] ** 0.5", "")),
                        "not divided by sqrt(W)"),
        "divided by W": (attend(f"{SEEN} @ values", ATTEND.replace(" ** 0.5", "")), "divided by W, not by its root"),
        "mask of 0": (attend("s.masked_fill(hidden, 0.0).softmax(-1) @ values"),
                      "a masked score of 0 is no masked slot"),
        "mask of -50": (attend("s.masked_fill(hidden, -50.0).softmax(-1) @ values"), "one that others can fall below"),
        "mask of -1e4": (attend("s.masked_fill(hidden, -1e4).softmax(-1) @ values"), "one that others can fall below"),
        "rest of the cache zeroed": (attend(f"keys[hidden.expand_as(s)[:, :, 0]] = 0\n    return {SEEN} @ values"),
                                     "other slots of the cache than the new token's are changed"),
        "new token does not see itself": (
            attend(f"{SEEN} @ values",
                   ATTEND.replace("cache.update(k, v, 0)", "cache.layers[0]").replace("> c", ">= c")),
            "does not look at itself"),
        "not written": (
            "def attend(q, k, v, cache):\n    row, at = torch.arange(len(q)), cache.positions[:, 0]\n"
            "    keys, values = (store.clone() for store in cache.layers[0])\n"
            "    keys[row, :, at], values[row, :, at] = k[:, :, 0], v[:, :, 0]\n"
            "    hidden = (torch.arange(cache.slots) > cache.positions)[:, None, None]\n"
            "    s = (q @ keys.mT / q.shape[-1] ** 0.5).masked_fill(hidden, -torch.inf)\n"
            "    return s.softmax(-1) @ values", "are not in the cache"),
        "query changed in place": (attend(f"{SEEN} @ values", ATTEND.replace("    s = q", "    q *= 2\n    s = q / 2")),
                                   "changes its argument q"),
        "softmax over rows": (attend("s.masked_fill(hidden, -torch.inf).softmax(0) @ values"), "decode step 0 of rows"),
        "position + 1": (decode("position[:, None] + 1"), "position is the number of tokens before it"),
        "one position for all": (decode("position.max().expand(3)[:, None]"), "every row has its own position"),
        "a new cache": (decode(cache="clipo.KVCache(cache.slots)"), "use the cache that is given"),
        "log-probs": (decode(logits=f"{LOGITS}.log_softmax(-1)"), "the logits are asked for"),
        "(B, 1, V)": (decode(logits="clipo.output_logits(model, states)"), "got a tensor of shape (3, 1, 30)"),
        "states": (decode(logits="states[:, 0]"), "got a tensor of shape (3, 16)"),
    },
    "05_mean_pooling": {
        "divided by T": (POOL.format("return kept.mean(2)"), "it is divided by T"),
        "padding in the mean": (POOL.format("return states.mean(2)"), "the padding is in the mean"),
        "0 times infinity": ("def pool(states, mask):\n"
                             "    return (states * mask[..., None]).sum(2) / mask.sum(-1, keepdim=True)",
                             "0 times infinity is not 0"),
        "sum": (POOL.format("return kept.sum(2)"), "this is the sum"),
        "divided by the longest": (POOL.format("return kept.sum(2) / mask.sum(-1).max()"), "has its own length"),
        "last token": (POOL.format("at = mask.sum(-1)[..., None, None] - 1\n"
                                   "    return states.gather(2, at.expand(-1, -1, 1, states.shape[-1]))[:, :, 0]"),
                       "the last token's state only"),
        "detached": (POOL.format("return (kept.sum(2) / mask.sum(-1, keepdim=True)).detach()"),
                     "no gradient reaches states"),
        "through numpy": (POOL.format("return torch.tensor((kept.sum(2) / mask.sum(-1, keepdim=True)).tolist())"),
                          "no gradient reaches states"),
        "states changed in place": ("def pool(states, mask):\n    states[~mask] = 0\n"
                                    "    return states.sum(2) / mask.sum(-1, keepdim=True)",
                                    "changes its argument states"),
        "axes exchanged": (POOL.format("return (kept.sum(2) / mask.sum(-1, keepdim=True)).transpose(0, 1)"),
                           "got a tensor of shape (3, 2, 4)"),
    },
    "06_infonce": {
        "itself in the denominator": (six(among="s"), "the anchor itself is in the denominator"),
        "other positives left out": (six(among="s.masked_fill(pairs.positive & ~pairs.target | me, -torch.inf)"),
                                     "the other right answers are not in the denominator"),
        "wrong ones left out": (six(among="s.masked_fill(~pairs.positive, -1e9)"), "the wrong answers are not in"),
        "a finite score for itself": (six(among="s.masked_fill(me, -20.0)"), "a finite score, like -20, is not low"),
        "positive left out": (six(among="s.masked_fill(me | pairs.target, -torch.inf)"), "the positive is not in"),
        "mean over positives": (six(pull="(s * pairs.positive).sum(-1) / pairs.positive.sum(-1).clamp(min=1)"),
                                "the mean over all positives is taken"),
        "target replaced by positive": (six(pull="(s * pairs.positive).sum(-1)"), "all positives are added up"),
        "tau missing": (INFONCE.replace(" / tau", "").format(**SIX), "tau is missing"),
        "tau hard-coded": (INFONCE.replace("/ tau", "/ 0.05").format(**SIX), "tau is taken for 0.05"),
        "sign": (INFONCE.replace("anchor, L", "anchor, -L").format(**SIX), "the sign is wrong"),
        "over all questions": ("def infonce(z, pairs, tau=0.05):\n    P, G, E = z.shape\n    flat = z.view(-1, E)\n"
                               "    s = (flat @ flat.T / tau).fill_diagonal_(-torch.inf).logsumexp(-1).view(P, G)\n"
                               "    L = s - ((z @ z.mT / tau) * pairs.target).sum(-1)\n"
                               "    return torch.where(pairs.anchor, L, 0.0)", "reaches over all questions"),
        "overflow": (INFONCE.replace(".logsumexp(-1)", ".exp().sum(-1).log()").format(**SIX), "exp overflows"),
        "anchors by positives alone": (INFONCE.replace("pairs.anchor", "pairs.positive.any(-1)").format(**SIX),
                                       "where all are right there is none"),
        "no anchors get something": (INFONCE.replace("torch.where(pairs.anchor, L, 0.0)", "L").format(**SIX),
                                     "no anchors get 0"),
        "detached": (INFONCE.replace("anchor, L", "anchor, L.detach()").format(**SIX), "no gradient reaches z"),
        "positive detached": (six(pull="(s * pairs.target).sum(-1).detach()"), "s_ij has none"),
        "item on one term": (six(pull="torch.tensor([[(s[p, i] * pairs.target[p, i]).sum().item() "
                                 "for i in range(s.shape[1])] for p in range(len(s))])"), "s_ij has none"),
        "denominator detached": (six(among="s.detach().masked_fill(me, -torch.inf)"), "the denominator has none"),
        "one z detached": (INFONCE.replace("z.mT", "z.detach().mT").format(**SIX), "one of the two z"),
        "gradient NaN": (
            INFONCE.replace("({among}).logsumexp(-1)", f"(s.exp() * ({OTHERS})).sum(-1).log()").format(**SIX),
            "it is not finite"),
        "chance log G": (six(chance="math.log(G)"), "there are G - 1 others"),
        "chance a probability": (six(chance="1 / (G - 1)"), "a loss, not a probability"),
        "chance to base 2": (six(chance="math.log2(G - 1)"), "to base e"),
        "chance None": (six(chance="None"), "chance_level(8) is None; expected a number"),
        "floor 0": (six(floor="0.0"), "not 0: the other right answers are in the denominator too"),
        "floor log n": (six(floor="math.log(n)"), "the anchor itself is not among them"),
    },
    "07_reward_cap": {
        "no prediction": (seven(guess="None"), "PREDICTION is None; expected a number from 0 to 1"),
        "prediction in percent": (seven(guess="60"), "PREDICTION is 60; expected a number from 0 to 1"),
        "cap upside down": (seven(paid=SEVEN["paid"].replace("min", "max")), "the cap is the wrong way round"),
        "no anchors are paid": (seven(paid="return (-weight * L).clamp(min=floor)"), "no anchors get 0"),
        "anchors by positives alone": (seven(paid=SEVEN["paid"].replace("pairs.anchor", "pairs.positive.any(-1)")),
                                       "where all are right there is none"),
        "no floor": (seven(paid="return torch.where(pairs.anchor, -weight * L, 0.0)"), "there is no floor"),
        "sign": (seven(paid=SEVEN["paid"].replace("-weight", "weight")), "the sign is wrong"),
        "0.2 hard-coded": (seven(paid=SEVEN["paid"].replace("weight", "0.2")), "the weight is 0.2 whatever is given"),
        "-0.5 hard-coded": (seven(paid=SEVEN["paid"].replace("=floor", "=-0.5")),
                            "the floor is -0.5 whatever is given"),
        "0.2 and -0.5 hard-coded": (seven(paid=SEVEN["paid"].replace("=floor", "=-0.5").replace("weight", "0.2")),
                                    "whatever is given"),
        "floor before the weight": (seven(paid="return torch.where(pairs.anchor, weight * (-L).clamp(min=floor), 0.0)"),
                                    "the floor is put on L"),
        "L changed in place": (seven(paid="L *= -weight\n    return (L * pairs.anchor).clamp(min=floor)"),
                               "changes its argument L"),
        "one too few": (seven(largest="int(math.exp(-floor / weight))"), "largest_group(0.2, -0.5) is 12; expected 13"),
        "round": (seven(largest="round(math.exp(-floor / weight) + 1)"), "largest_group(0.5, -0.5) is 4; expected 3"),
        "13 whatever is given": (seven(largest="13"), "is 13; expected 149"),
        "a fraction": (seven(largest="math.exp(-floor / weight) + 1"), "expected 13"),
        "weight as at first": (seven(weight="0.2"), "60% of the anchors of G = 16 are on the floor"),
        "weight 0": (seven(weight="0"), "WEIGHT is 0; expected a number from 0.001"),
        "it pays the best": (seven(letter="'a'"), "it cannot tell them apart yet"),
        "no letter": (seven(letter="'C'"), "expected one of: a, b, c"),
    },
    "08_equal_rewards": {
        "no prediction": (eight(guess="None"), "PREDICTION is None"),
        "mean of A": (eight(mean="A.mean().item()"), "this is the mean of A, which is always 0"),
        "sum": (eight(mean="A.abs().sum().item()"), "this is the sum over the group"),
        "largest": (eight(mean="A.abs().max().item()"), "this is the largest |A|"),
        "squares": (eight(mean="A.square().mean().item()"), "the mean of A squared"),
        "std divided by G": (eight(mean="(A * (16 / 15) ** 0.5).abs().mean().item()"), "Bessel's correction"),
        "no eps": (SIZE.replace("scale_by_std=scale_by_std", "scale_by_std=scale_by_std, eps=0").format(**EIGHT),
                   "eps is missing"),
        "scale_by_std ignored": (SIZE.replace(", scale_by_std=scale_by_std", "").format(**EIGHT),
                                 "scale_by_std changes nothing, or is upside down"),
        "a tensor of all": (eight(mean="A.abs()"), "expected a number"),
        "size as at first": (eight(size="0.1"), "SIZE is 0.1, and the mean |A| is 0.79 there"),
        "size too small": (eight(size="1e-9"), "no difference is left"),
        "they vanish": (eight(letter="'b'"), "EXPLANATION: without the std they do"),
        "without bound": (eight(letter="'c'"), "the std grows as they do"),
    },
    "09_lenient_checker": {
        "no prediction": (nine(guess="None"), "PREDICTION is None"),
        "a guess for the strict one": (nine(text="'#### ' + q.split()[-1]"), "with them this is a guess"),
        "it calculates": (nine(text="'3 + 4 = 7'"), "calculates; a farmer does not work"),
        "no number": (nine(text="'I do not know'"), "who in the story says a number"),
        "the first number": (nine(text="q.split()[2]"), "who in the story says a number"),
        "a number": (nine(text="5"), "the response is 5; expected a text"),
        "two clauses": (nine(clauses="2"), "expected fewer than half"),
        "five clauses": (nine(clauses="5"), "the least number is asked for"),
        "four and a half": (nine(clauses="4.5"), "expected a whole number"),
        "slower": (nine(letter="'a'"), "a little faster, if anything"),
        "only in evaluation": (nine(letter="'c'"), "its mistakes are the same"),
    },
    "10_own_loss": {
        "only pulls": (ten("-mean"), "does not rise when a wrong answer comes closer"),
        "only pushes": (ten("(s * pairs.negative).sum(-1)"), "does not fall when the positives come closer"),
        "sign": (ten("-variants.decoupled(z, pairs, tau)"), "does not fall when the positives come closer"),
        "detached": (ten("variants.decoupled(z, pairs, tau).detach()"), "no gradient reaches z"),
        "no tau": (MINE.replace("(z, tau)\n", "(z, 1.0)\n").format(
            loss="F.softplus(" + HARDEST + " - mean)", chance="math.log(2) + 0 * positives"), "tau changes nothing"),
        "overflow": (ten("((s.exp() * pairs.negative).sum(-1) / (s.exp() * pairs.positive).sum(-1)).log()"),
                     "exp(200) is infinite"),
        "looks at itself": (ten("s.logsumexp(-1) - s.masked_fill(~pairs.positive, -math.inf).logsumexp(-1)"),
                            "the anchor's similarity to itself changes the loss"),
        "0 / 0": (ten("(s * pairs.negative).sum(-1) - (s * pairs.positive).sum(-1) / pairs.positive.sum(-1)"),
                  "in groups without an anchor loss or gradient is not finite: one 0 / 0"),
        "target replaced by positive": (ten(f"clipo.log_sum(s, {OTHERS}) - (s * pairs.positive).sum(-1)",
                                            "(positives + negatives).log()"),
                                        "Is a sum over positives divided by their number?"),
        "a mean over the batch": (ten("(L := variants.decoupled(z, pairs, tau)) + L[pairs.anchor].mean()"),
                                  "changes with the other groups of the batch"),
        "divided by all anchors": (ten("variants.decoupled(z, pairs, tau) / pairs.anchor.sum().clamp(min=1)"),
                                   "changes with the other groups of the batch"),
        "centred over the batch": (ten("F.softplus(" + HARDEST + " - mean) * s.std()", "math.log(2) + 0 * positives"),
                                   "changes with the other groups of the batch"),
        "no chance level": (ten(HARDEST + " - 2 * mean"), "it has no chance level"),
        "another chance": (ten("variants.decoupled(z, pairs, tau)", "negatives.log()"),
                           "my_chance, against my_loss of"),
        "chance a number": (ten("variants.decoupled(z, pairs, tau)", "0.69"), "my_chance: got 0.69"),
        "no zeros": (MINE.replace("torch.where(pairs.anchor, {loss}, 0.0)", "{loss}").format(
            loss="F.softplus(" + HARDEST + " - mean)", chance="math.log(2) + 0 * positives"),
            "groups without an anchor"),
        "z changed in place": (ten("F.softplus(" + HARDEST + " - mean)", "math.log(2) + 0 * positives").replace(
            "    s = ", "    z = z.mul_(2) if not z.requires_grad else z * 2\n    s = "), "changes its argument z"),
        "a mean": (MINE.replace("torch.where(pairs.anchor, {loss}, 0.0)", "{loss}.mean()").format(
            loss="F.softplus(" + HARDEST + " - mean)", chance="positives"), "a loss for each"),
        "pays nothing": (ten("F.relu(1 + clipo.log_sum(s, pairs.negative) - neg.clamp(min=1).log() "
                             "- clipo.log_sum(s, pairs.positive))"),
                         "expected more than 0.05"),
    },
    "11_two_changes": {
        "no prediction": (eleven(guess="{'centring alone': 0.1, 'chance alone': None, 'both': 0.1}"),
                          "PREDICTION is None; expected a number from -2 to 2"),
        "one prediction": (eleven(guess="0.5"), "expected a number for each of: centring alone, chance alone, both"),
        "mean over D": (eleven(centred="h - h.mean(-1, keepdim=True)"), "over each rollout's own numbers"),
        "mean over prompts": (eleven(centred="h - h.mean(0, keepdim=True)"), "the mean is over the prompts"),
        "mean over the batch": (eleven(centred="h - h.mean((0, 1), keepdim=True)"), "over the whole batch"),
        "one number": (eleven(centred="h - h.mean((1, 2), keepdim=True)"), "the mean is one number"),
        "the mean itself": (eleven(centred="h.mean(1, keepdim=True).expand_as(h)"), "this is the mean itself"),
        "divided by the std": (eleven(centred="(h - h.mean(1, keepdim=True)) / h.std(1, keepdim=True)"),
                               "only the mean is taken away"),
        "h changed in place": (eleven(centred="h.sub_(h.mean(1, keepdim=True))"), "changes its argument h"),
        "InfoNCE's chance": (eleven(chance="(positives + negatives).log()"), "this is the chance level of InfoNCE"),
        "without the 1": (eleven(chance="negatives.log()"), "the 1 inside the log is missing"),
        "Soft-NN's chance": (eleven(chance="(1 + negatives / positives).log()"), "does not divide the negatives"),
        "chance to base 2": (eleven(chance="(1 + negatives).log2()"), "to base e"),
        "from 0": (eleven(paid=ELEVEN["paid"].replace("chance - L", "-L")), "this is measured from 0"),
        "sign": (eleven(paid=ELEVEN["paid"].replace("chance - L", "L - chance")), "a loss above chance is paid"),
        "no ceiling": (eleven(paid=ELEVEN["paid"].replace("floor, ceiling", "min=floor")), "there is no ceiling"),
        "no floor": (eleven(paid=ELEVEN["paid"].replace("floor, ceiling", "max=ceiling")), "there is no floor"),
        "no bounds": (eleven(paid=ELEVEN["paid"].replace(".clamp(floor, ceiling)", "")), "neither floor nor ceiling"),
        "no anchors are paid": (eleven(paid="return (weight * (chance - L)).clamp(floor, ceiling)"),
                                "no anchors get 0"),
        "bounds hard-coded": (eleven(paid=ELEVEN["paid"].replace("floor, ceiling", "-0.9, 1.0")),
                              "-0.9 and 1 whatever"),
        "no weight": (eleven(paid=ELEVEN["paid"].replace("weight * ", "")), "the weight is left out"),
        "bounds before the weight": (
            eleven(paid="return torch.where(anchor, weight * (chance - L).clamp(floor, ceiling), 0.0)"),
            "before the weight"),
        "weight on L alone": (eleven(paid=ELEVEN["paid"].replace("weight * (chance - L)", "chance - weight * L")),
                              "the weight is on L alone"),
        "SHARED as at first": (eleven(shared="8.0"), '"chance alone" pays 0.04 there'),
        "cosines": (eleven(letter="'a'"), "the other way round"),
        "what right ones share": (eleven(letter="'b'"), "what right ones share beyond that stays"),
        "the head": (eleven(letter="'c'"), "the head is as untrained there"),
    },
}  # fmt: skip

# Other right ways, which must pass.
HALF = "0.5 * clipo.infonce(z, pairs, tau) + 0.5 * variants.decoupled(z, pairs, tau)"
MEAN_OF_WRONG = "clipo.log_sum(s, pairs.negative) - neg.clamp(min=1).log()"
LOG2 = "math.log(2) + 0 * positives"
RIGHT = {
    "01_group_advantage": {
        "root of the variance": ADVANTAGES.format("c / (r.var(-1, keepdim=True).sqrt() + eps)"),
        "clipo's": "from clipo import group_advantages",
    },
    "02_kl": {"expm1": K3.format("d.expm1() - d"), "clipo's": "SMALLEST, SMALLEST_AT = 0, 0\nfrom clipo import kl_k3"},
    "03_clipped_ratio": {
        "clipo's": "from clipo import clipped_surrogate",
        "by the sign of A": three("torch.where(A > 0, rho.clamp(max=1 + high), rho.clamp(min=1 - low)) * A"),
    },
    "04_decode_step": {
        "torch's attention": "import torch.nn.functional as F\n"
        + attend("F.scaled_dot_product_attention(q, keys, values, attn_mask=~hidden)") + "\n" + decode(),
        "a mask of -1e9": attend("s.masked_fill(hidden, -1e9).softmax(-1) @ values") + "\n" + decode(),
    },
    "05_mean_pooling": {
        "where": "def pool(states, mask):\n"
        "    return torch.where(mask[..., None], states, 0).sum(2) / mask.sum(2)[..., None]",
    },
    "06_infonce": {
        "clipo's": "from clipo import infonce\nchance_level = lambda G: math.log(G - 1)\n"
        "floor = lambda n: torch.tensor(n - 1.0).log()",
    },
    "07_reward_cap": {"maximum": seven(paid="return (-weight * L).clamp(min=floor) * pairs.anchor")},
    "08_equal_rewards": {"float": eight(mean="float(sum(A[0].abs()) / 16)")},
    "09_lenient_checker": {"the last word": nine(text="q.split()[-1]")},
    "10_own_loss": {
        "InfoNCE": ten("clipo.infonce(z, pairs, tau)", "(positives + negatives).log()"),
        "half InfoNCE, half decoupled": ten(HALF, "0.5 * (positives + negatives).log() + 0.5 * (1 + negatives).log()"),
        "SupCon, out": ten("variants.supcon_out(z, pairs, tau)", "(positives + negatives).log()"),
        "Soft-NN": ten("variants.soft_nn(z, pairs, tau)", "(1 + negatives / positives).log()"),
        "decoupled": ten("variants.decoupled(z, pairs, tau)", "(1 + negatives).log()"),
        "drawn, hardest": ten(f"F.softplus({HARDEST} - {DRAWN})", LOG2),
        "margin": ten(f"F.relu(1 + {HARDEST} - mean)", "1 + 0 * positives"),
        "margin, farthest": ten(f"F.relu(1 + {HARDEST} - {FARTHEST})", "1 + 0 * positives"),
        "farthest, hardest": ten(f"F.softplus({HARDEST} - {FARTHEST})", LOG2),
        "farthest, mean of wrong": ten(f"F.softplus({MEAN_OF_WRONG} - {FARTHEST})", LOG2),
        "mean of wrong": ten(f"F.softplus({MEAN_OF_WRONG} - mean)", LOG2),
        "Soft-NN, mean of wrong": ten(
            f"F.softplus({MEAN_OF_WRONG} - clipo.log_sum(s, pairs.positive))", "(1 + 1 / positives).log()"),
        "half margin, half InfoNCE": ten(
            f"0.5 * F.relu(1 + {HARDEST} - mean) + 0.5 * clipo.infonce(z, pairs, tau)",
            "0.5 + 0.5 * (positives + negatives).log()"),
    },
    "11_two_changes": {"sum": eleven(centred="h - h.sum(1, keepdim=True) / h.shape[1]")},
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------
# Tests
# ----------------------------------------------------------------------------------------------------


def lines_of(file: Path) -> set[str]:
    """The lines of a Python file that could give something away: all but the shortest, and comments."""
    lines = (line.strip().rstrip(",(") for line in file.read_text().splitlines())
    return {line for line in lines if len(line) > 20 and not line.startswith(("#", "import ", "from "))}


def messages(exercise: str, file: Path) -> list[str]:
    """What an exercise's check says to an answer, a text for each test that fails."""
    return [said for _, said in checking.verdicts(exercise, file) if said is not None]


def written(source: str, folder: Path) -> Path:
    file = folder / "answer.py"
    file.write_text(f"import math\nimport torch\nimport clipo\n{source}\n")
    return file


def cases(table: dict) -> list[tuple[str, str]]:
    return [(exercise, name) for exercise, answers in table.items() for name in answers]


def run(*arguments, **more):
    """A command of a student's, in the repository."""
    return processes.run("-m", *arguments, cwd=ROOT, env={**os.environ, **more})


@pytest.mark.parametrize("exercise", NAMES)
def test_the_reference_passes(exercise):
    assert messages(exercise, FOLDER / "solutions" / f"{exercise}.py") == []


@pytest.mark.parametrize("exercise, name", cases(RIGHT))
def test_other_right_ways_pass(exercise, name, tmp_path):
    said = messages(exercise, written(RIGHT[exercise][name], tmp_path))
    mine = {f.name for f in ast.parse(RIGHT[exercise][name]).body if isinstance(f, ast.FunctionDef)}
    left_out = [text for text in said if re.search(r"answer.py has no (SMALLEST|chance_level|floor|decode_step)", text)]
    assert said == left_out and (mine or not said)


def test_there_are_many_wrong_answers():
    assert list(WRONG) == NAMES and len(cases(WRONG)) >= 150 and min(map(len, WRONG.values())) >= 10


@pytest.mark.parametrize("exercise, name", cases(WRONG))
def test_a_wrong_answer_is_told_what_is_wrong(exercise, name, tmp_path):
    source, expected = WRONG[exercise][name]
    said = messages(exercise, written(source, tmp_path))
    assert any(expected in text for text in said), said
    hidden = lines_of(FOLDER / "solutions" / f"{exercise}.py") - lines_of(tmp_path / "answer.py")
    assert not [line for line in hidden for text in said if line in text]


@pytest.mark.parametrize("exercise", NAMES)
def test_the_stub_fails_and_says_where_to_write(exercise):
    stub = FOLDER / exercise / "answer.py"
    said = messages(exercise, stub)
    assert len(said) == len(checking.checks_of(exercise)) and not any("\n" in text or "Error" in text for text in said)
    assert any(f"in exercises/{exercise}/answer.py; hints.md helps" in text for text in said)
    assert (FOLDER / exercise / "hints.md").is_file()
    assert stub.read_text() == (FOLDER / "unwritten" / f"{exercise}.py").read_text()


def broken(solution: str, how: str) -> str:
    """A solution whose functions fail on their second line."""
    lines = solution.splitlines()
    for part in reversed(ast.parse(solution).body):
        if isinstance(part, ast.FunctionDef):
            lines[part.body[0].end_lineno : part.end_lineno] = [f"    {how}"]
    return "\n".join(lines)


def test_no_check_shows_its_source(tmp_path):
    """Untouched, and with answers that fail in other ways: what pytest prints has no line of a check."""
    secret = set().union(*(lines_of(file) for file in FOLDER.glob("*/test_*.py")))
    said = {"untouched": run("pytest", "exercises").stdout}
    for how in ("oops = 1 / 0", "raise SystemExit(0)", "return 'text'", "oops = ="):
        folder = tmp_path / re.sub(r"\W", "", how)
        folder.mkdir()
        for name in NAMES:
            (folder / f"{name}.py").write_text(broken((FOLDER / "solutions" / f"{name}.py").read_text(), how))
        said[how] = run("pytest", "exercises", CLIPO_ANSWERS=str(folder)).stdout
    for how, text in said.items():
        assert not [line for line in secret if line in text], how
        assert not re.search(r"test_\d\d\.py:\d", text) and "Traceback" not in text and "INTERNALERROR" not in text
    assert "01_group_advantage.py, line 8, in group_advantages: oops = 1 / 0\nZeroDivisionError" in said["oops = 1 / 0"]
    assert "ends the program" in said["raise SystemExit(0)"]
    assert "01_group_advantage.py, line 8: oops = =\nSyntaxError: invalid syntax" in said["oops = ="]
    assert "got 'text'; expected a tensor" in said["return 'text'"]


def test_got_and_expected_never_print_alike():
    assert doctest.testmod(checking).failed == 0
    import torch

    ones = torch.ones(4, 4)
    with pytest.raises(pytest.fail.Exception, match=r"at \[0, 1\]: got 1.001, expected 1\n") as reason:
        checking.agree(ones + torch.eye(4).roll(1, 1) * 0.001, ones, "ones")
    assert "and 1 more of 16" in str(reason.value) and str(reason.value).count("\n") == 4


def test_the_commands_of_a_student_and_of_a_teacher():
    stub = run("pytest", "exercises/03_clipped_ratio")
    assert stub.returncode == 1
    assert "write clipped_surrogate in exercises/03_clipped_ratio/answer.py; hints.md helps" in stub.stdout
    assert "raise NotImplementedError" not in stub.stdout  # one line, no source code
    everything = run("pytest", "exercises", CLIPO_ANSWERS="exercises/solutions")
    assert everything.returncode == 0, everything.stdout
    plot = run("exercises.plots", "8")
    assert plot.returncode == 2 and plot.stderr.startswith("error: write mean_size in exercises/08")
    plot = run("exercises.plots")
    assert plot.returncode == 2 and plot.stderr == "error: nothing given; expected one of: 7, 8, 9, 10, 11\n"


@pytest.mark.parametrize("number", ["7", "8", "9", "10", "11"])
def test_the_plot_to_expect_is_what_the_reference_draws(number, monkeypatch, tmp_path, capsys):
    from exercises import plots

    folder = plots.PLOTS[number][0]
    monkeypatch.setenv("CLIPO_ANSWERS", str(FOLDER / "solutions"))
    monkeypatch.setattr(plots, "HERE", tmp_path)
    (tmp_path / folder).mkdir()
    assert plots.main([number]) == 0
    assert (tmp_path / folder / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert (FOLDER / folder / "expected.png").is_file()
    assert ("you predicted" in capsys.readouterr().out) == (number in ("7", "8"))  # of 9 and 11 at the first number


def test_the_experiments_measure_what_their_texts_say():
    from exercises import plots

    solution = checking.load(FOLDER / "solutions" / "11_two_changes.py")
    paid = {name: plots.two_changes(solution, *changes, shared=8.0) for name, *changes in plots.FORMS}
    assert max(abs(paid[name]) for name in ("neither", "centring alone", "chance alone")) < 0.1 < 1 < paid["both"] < 2
    assert plots.two_changes(solution, False, True, shared=2.0) > 0.3
    assert 0.5 < plots.on_the_floor(16, 0.2) < 0.7 and plots.on_the_floor(16, 0.1) < 0.25
    farm = checking.load(FOLDER / "solutions" / "09_lenient_checker.py").farmed_response
    assert [plots.paid_by(farm, clauses)["lenient"] > 0.5 for clauses in range(1, 6)] == [True] * 3 + [False] * 2


def test_the_experiments_have_different_letters():
    letters = [re.search(r'EXPLANATION.* = "(.)"', file.read_text()) for file in (FOLDER / "solutions").glob("*.py")]
    assert sorted(letter[1] for letter in letters if letter) == ["a", "b", "c", "d"]


def shown_commands():
    """The commands under the questions of the lesson plan."""
    questions = (FOLDER / "README.md").read_text().split("## Questions that come up")[1]
    return [line.strip() for line in questions.splitlines() if line.startswith("    ")]


@pytest.mark.parametrize("command", shown_commands())
def test_every_question_has_a_command_that_works(command):
    settings, arguments = re.fullmatch(r"((?:\w+=\S+ )*)python (.*)", command).groups()
    more = dict(setting.split("=") for setting in settings.split())
    done = processes.run(*shlex.split(arguments), cwd=ROOT, env={**os.environ, **more})
    assert done.returncode == 0, done.stdout + done.stderr
    assert not re.search(r"\bno tests ran\b|\b0 selected\b", done.stdout) and done.stdout.strip()


def test_the_lesson_plan_names_every_exercise_in_order():
    plan = (FOLDER / "README.md").read_text().split("## Words")[0]
    assert re.findall(r"\]\((\d\d_\w+)\)", plan) == NAMES and len(NAMES) == 11
