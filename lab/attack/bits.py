"""Does the same seed give the same bits, however many threads compute? The same two steps, over and over, by phase.

    python -m lab.attack bits             both engines, six kinds of run, 2 to 4 threads, 20 times each
    python -m lab.attack bits --quick     three times each, at two threads

What adds numbers in the order in which threads come (the gradient of x[index], say, where an index comes twice) rounds
differently from run to run. The phase in which bits first differ tells where to look.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from config import CLIPOConfig
from engine.guard import Trainer
from run import warm_start as run_warm_start
from tasks import toy

# What differs from the toy track, or another track. (torch.use_deterministic_algorithms stays off: it is the whole
# process's, it ends a run whose model has an operation without such a form, and it would hide what is looked for here.
# On a CPU it failed nowhere, changed no bit on one thread and no time beyond the noise.)
KINDS = {
    "informative": {},
    "the paper's": {"contrastive_kind": "infonce", "contrastive_scope": "group", "reward_from_chance": False},
    "with KL, two mini-batches": {"beta": 0.1, "mini_batch_prompts": 3},
    "activations computed again": {"recompute_activations": True, "beta": 0.1},
    "the gsm8k track": {"track": "gsm8k", "beta": 0.1, "mini_batch_prompts": 2, "lr": 2e-4, "compute_dtype": "float32"},
    "in bfloat16": {"compute_dtype": "bfloat16", "prompts_per_step": 4, "samples_per_prompt": 8},
}


def digest(tensors: Iterable[Tensor]) -> str:
    """Of the bits of all."""
    all_bits = hashlib.sha256()
    for tensor in tensors:
        all_bits.update(tensor.detach().contiguous().numpy().tobytes())
    return all_bits.hexdigest()[:12]


def half_right(texts: Sequence[str], golds: Sequence[str]) -> list[bool]:
    """Calls about half of the texts right: a model this young is never right, and then nothing would be learnt."""
    return [sum(text.encode()) % 2 == 0 for text in texts]


def bits_of_a_run(engine: str, changes: dict, steps: int = 2) -> dict[str, str]:
    """{phase: digest} of a short warm start and of each step after it."""
    tokenizer = toy.make_tokenizer()
    model = run_warm_start.make_model("tiny", tokenizer, seed=0)
    run_warm_start.warm_start(model, tokenizer, 0, batches=2, batch_size=32)
    found = {"warm start": digest(model.parameters())}
    small = {"head_warmup_steps": 0, "lr_warmup_steps": 0, "prompts_per_step": 6, "max_new_tokens": 16}
    config = CLIPOConfig.for_track(**{"track": "toy", **small, **changes})
    trainer = Trainer(model, tokenizer, half_right, config, engine)
    for step in range(1, steps + 1):
        stories = toy.stories(f"bits {step}", toy.TRAINING_LEVEL, config.prompts_per_step)
        scored = trainer.step([tokenizer(s.question)["input_ids"] for s in stories], [s.answer for s in stories])
        agreement = scored.agreement
        found[f"rollouts of step {step}"] = digest(scored.rollouts)
        found[f"contrast of step {step}"] = digest([agreement.embedding, agreement.loss, agreement.reward])
        found[f"head after step {step}"] = digest(trainer.head.parameters())
        found[f"policy after step {step}"] = digest(trainer.policy.parameters())
    return found


def first_difference(runs: Sequence[dict[str, str]]) -> str | None:
    """The first phase whose bits are not those of the first run, in any of the others.

    >>> first_difference([{"a": "1", "b": "2"}, {"a": "1", "b": "3"}])
    'b'
    """
    return next((phase for phase in runs[0] if len({run[phase] for run in runs}) > 1), None)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lab.attack bits", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, default=20, metavar="N", help="runs that are compared (default: 20)")
    parser.add_argument("--quick", action="store_true", help="three runs each, at two threads")
    given = parser.parse_args(arguments)
    times, begin, before, runs, differ = 3 if given.quick else given.times, time.time(), torch.get_num_threads(), 0, []
    for threads in (2,) if given.quick else (2, 3, 4):
        torch.set_num_threads(threads)
        for engine in ("plain", "fast"):
            for kind, changes in KINDS.items():
                found = [bits_of_a_run(engine, changes) for _ in range(times)]
                runs += times
                if phase := first_difference(found):
                    differ.append(f"{engine}, {kind}, {threads} threads: from {phase}")
    torch.set_num_threads(before)
    print(*differ, sep="\n", end="\n" if differ else "")
    print(f"bits: {runs} runs in sets of {times}, {len(differ)} sets with different bits, {time.time() - begin:.0f} s")
    return 1 if differ else 0
