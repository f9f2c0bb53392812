"""CLIPO's reward in TRL: for models and clusters that need DeepSpeed, FSDP, vLLM or several nodes.

    reward = ContrastiveReward(accuracy, CLIPOConfig())
    trainer = GRPOTrainer(model=..., reward_funcs=[accuracy, reward], ...)
    reward.attach(trainer)
    trainer.train()

`accuracy` is a reward function of TRL's that gives 1 or 0. `lab/trl_train.py` is a whole script.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate.utils import broadcast
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import TrainerCallback

import variants
from clipo import HeadTrainer
from config import CLIPOConfig
from run.folder import save_tensors


class ContrastiveReward(TrainerCallback):
    """rc of each completion: how well a right answer agrees with the other right answers to its prompt.

    Of `config` only the contrastive settings and the seed count; `head_warmup_steps` counts batches of rollouts, in
    which the head learns and rc is 0. (The paper leaves the policy alone in them; here it learns by its other rewards.)
    In evaluation it gives no reward. Saved with every checkpoint of the trainer, and read again by a resumed one.
    """

    __name__ = "contrastive_reward"  # in TRL's logs

    def __init__(self, is_correct: Callable[..., Sequence[float]], config: CLIPOConfig):
        self.is_correct, self.config = is_correct, config
        self.trainer = self.half = None

    def attach(self, trainer) -> None:
        """Tell it whose rollouts it rewards. Before `trainer.train()`."""
        self.trainer = trainer
        model = trainer.accelerator.unwrap_model(trainer.model)
        self.half = HeadTrainer(model.get_output_embeddings().in_features, trainer.accelerator.device, self.config)
        self.half.parts = variants.parts(self.config, self.half.random)
        trainer.add_callback(self)

    def __call__(
        self, prompts: list, completions: list, completion_ids: list[list[int]], log_metric=None, **columns
    ) -> list[float | None]:
        """rc of this process's completions. TRL calls it once for each batch of rollouts, on all processes."""
        if self.trainer is None:
            raise ValueError("ContrastiveReward has no trainer; expected reward.attach(trainer) before trainer.train()")
        if not self.trainer.model.training:
            return [None] * len(prompts)
        accelerator, count = self.trainer.accelerator, len(prompts)
        correct = self.is_correct(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)
        # TRL's own accuracy reward gives None where it cannot read the gold answer.
        correct = torch.tensor([right is not None and right > 0.5 for right in correct], device=accelerator.device)
        hidden = self.embed(prompt_tokens(self.trainer, prompts), completion_ids)
        # A group may be split over processes: every process gets all rollouts, in TRL's order, G to a prompt.
        G = self.trainer.num_generations
        hidden, correct = (accelerator.gather(part).unflatten(0, (-1, G)) for part in (hidden, correct))  # (P, G, ...)
        found = self.half.contrastive_step(hidden, correct)
        for parameter in self.half.head.parameters():  # all computed the same; on GPUs perhaps not to the last bit
            parameter.data.copy_(broadcast(parameter.data))
        loss, reward, anchor = found.loss, found.reward, found.pairs.anchor
        if self.half.steps_done < self.config.head_warmup_steps:
            reward = torch.zeros_like(reward)
        self.half.steps_done += 1
        if log_metric is not None and anchor.any():
            log_metric("contrastive_loss", loss[anchor].mean().item())
            log_metric("on_floor", (reward[anchor] <= self.config.reward_floor).float().mean().item())
        mine = slice(accelerator.process_index * count, (accelerator.process_index + 1) * count)
        return reward.flatten()[mine].tolist()

    @torch.no_grad()
    def embed(self, prompts: list[list[int]], responses: list[list[int]]) -> Tensor:
        """h (B, D) float32: the mean of the last layer's states over the response tokens but the last, as `generate`.

        The training model is called as TRL calls it, wrapped, so that its shards are gathered.
        """
        model, size = self.trainer.model_wrapped, self.trainer.args.per_device_train_batch_size
        pairs, device = list(zip(prompts, responses, strict=True)), self.trainer.accelerator.device
        means = []
        model.eval()  # no dropout
        for first in range(0, len(pairs), size):
            part = pairs[first : first + size]
            rows = [torch.tensor(prompt + response, device=device) for prompt, response in part]
            ids = pad_sequence(rows, batch_first=True)  # (rows, S), padded on the right, where nobody looks
            mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
            states = model(
                input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False, logits_to_keep=1
            ).hidden_states[-1]  # (rows, S, D)
            for row, (prompt, response) in zip(states, part, strict=True):
                first, end = len(prompt), len(prompt) + len(response) - 1
                fed_back = row[first:end] if end > first else row[first - 1 : first]  # of one token, or none
                means.append(fed_back.float().mean(0))
        model.train()
        return torch.stack(means)

    def on_save(self, args, state, control, **_) -> None:
        """With each of the trainer's checkpoints."""
        if state.is_world_process_zero:
            self.save(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_train_begin(self, args, state, control, **_) -> None:
        """A trainer that goes on from a checkpoint has its step number by now."""
        if state.global_step:
            self.load(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def save(self, folder: Path) -> None:
        """Head, its optimiser and its step number."""
        save_tensors(self.half.head.state_dict(), folder / "head.safetensors")
        torch.save(self.half.head_optimizer.state_dict(), folder / "head_optimizer.pt")
        (folder / "head_state.json").write_text(json.dumps({"steps_done": self.half.steps_done}))

    def load(self, folder: Path) -> None:
        """What `save` wrote. Raises FileNotFoundError."""
        device = self.trainer.accelerator.device
        self.half.head.load_state_dict(load_file(folder / "head.safetensors", device=str(device)))
        optimizer = torch.load(folder / "head_optimizer.pt", map_location=device, weights_only=True)
        self.half.head_optimizer.load_state_dict(optimizer)
        self.half.steps_done = json.loads((folder / "head_state.json").read_text())["steps_done"]


def prompt_tokens(trainer, prompts: list) -> list[list[int]]:
    """The token ids that TRL makes of its prompts, texts or conversations."""
    tokenizer = trainer.processing_class
    if isinstance(prompts[0], str):
        return tokenizer(text=prompts)["input_ids"]
    return tokenizer.apply_chat_template(
        conversation=prompts,
        chat_template=trainer.chat_template,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        **trainer.chat_template_kwargs,
    )["input_ids"]
