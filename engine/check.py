"""Can this model be served? Found out once, before any rollout, by comparison with a plain forward pass."""

from __future__ import annotations

from weakref import WeakSet

import torch

from engine.forward import KVCache, last_states, output_logits, prefill, serving

checked_models: WeakSet = WeakSet()


def check_model(model) -> None:
    """Once per model: do prefill and decode with our cache give the logits of a plain forward pass? Else an error.

    Some architectures keep other state than keys and values, count positions in their own way or scale their
    logits. Two prompts of different length and two decode steps tell, whatever the reason, before any rollout.
    """
    if model in checked_models:
        return
    rope = getattr(model.config, "rope_parameters", None) or {}
    types = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
    if depends_on_length := types & {"dynamic", "longrope"}:
        raise NotImplementedError(
            f"{type(model).__name__} cannot be served by KVCache: its rotary embedding ({depends_on_length.pop()}) "
            "changes with the longest row of a batch; use a model with another rope_type"
        )
    vocabulary = model.get_input_embeddings().num_embeddings
    sequences = [[i % vocabulary for i in ids] for ids in ([3, 1, 4, 1, 5], [9, 2, 6])]
    with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
        expected = [model(input_ids=torch.tensor([ids], device=model.device)).logits[0] for ids in sequences]
        try:
            with serving(model):
                cache = KVCache(rows=2, slots=5)
                prefill(model, [ids[:-1] for ids in sequences], cache)
                for back in (2, 1):  # feed the last token but one, then the last
                    token = torch.tensor([[ids[-back]] for ids in sequences], device=model.device)
                    position = torch.tensor([[len(ids) - back] for ids in sequences], device=model.device)
                    got = output_logits(model, last_states(model, token, position, cache, used=6 - back))[:, 0]
                    error = max((g - e[-back]).abs().max().item() for g, e in zip(got, expected, strict=True))
                    scale = max(e.abs().max().item() for e in expected)
                    if not error <= (1e-3 if model.dtype == torch.float32 else 0.1) * scale:
                        raise ValueError(f"its logits are off by {error:.2g} (largest logit {scale:.2g})")
        except (ValueError, AttributeError, TypeError, RuntimeError, IndexError) as reason:
            raise ValueError(
                f"{type(model).__name__} cannot be served by KVCache: {reason}. Expected a decoder-only model "
                "that takes position_ids, a 4-D attention_mask and past_key_values, as Qwen2 and Llama do"
            ) from reason
    checked_models.add(model)
