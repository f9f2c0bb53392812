"""The referee's arms: the oracle wants what `toy.is_sound` wants; agreement of texts and frozen states by hand."""

import pytest
import torch

import clipo
from config import CLIPOConfig
from lab import referees
from run import warm_start as run_warm_start
from tasks import toy

TINY = {"prompts_per_step": 2, "samples_per_prompt": 4, "mini_batch_prompts": 2, "head_warmup_steps": 0, "steps": 2}


@pytest.fixture(scope="module")
def started():
    """A model after some batches of demonstrations, and its tokenizer."""
    tokenizer = toy.make_tokenizer()
    model = run_warm_start.make_model("tiny", tokenizer, seed=0)
    run_warm_start.warm_start(model, tokenizer, 0, batches=8)
    return model, tokenizer


def a_trainer(kind, started, **changes):
    config, (model, tokenizer) = CLIPOConfig.for_track("toy", **TINY, **changes), started
    task_kind, trainer_kind = referees.of_kind(kind)
    task = task_kind(config, tokenizer)
    return trainer_kind(model, tokenizer, task.are_correct, config), task


def test_the_oracle_wants_what_is_sound(started):
    _, task = a_trainer("oracle", started)
    assert task.problems(0) == a_trainer("", started)[1].problems(0)
    for story in task.problems(0):
        sound = toy.write(story.solution, int(story.answer))
        ids = started[1](sound)["input_ids"]
        texts = [sound, started[1].decode(ids), sound + "0", f"#### {story.answer}", sound + " 5"]
        assert task.are_correct(texts, [story] * 5) == [True, True, False, False, False]
        assert [toy.is_sound(story, text) for text in texts] == [True, True, False, False, False]


@pytest.mark.parametrize("kind, alike", [("same steps", referees.same_steps), ("similar text", referees.similar_text)])
def test_agreement_of_texts_is_paid_between_floor_and_ceiling(started, kind, alike):
    trainer, _ = a_trainer(kind, started)
    texts = [["1 + 1 = 2 . #### 2", "1 + 1 = 2 . #### 2", "1 + 2 = 2 . #### 2", "#### 3"], ["#### 1"] * 4]
    correct = torch.tensor([[True, True, True, False], [False, True, False, False]])
    paid = trainer.total_reward(clipo.Sampled([], [], None, texts, correct), torch.zeros(2, 4)) - correct.float()
    one = alike(texts[0][0], texts[0][2])
    low, high = trainer.config.reward_floor, trainer.config.reward_ceiling
    means = [(1 + one) / 2, (1 + one) / 2, one]
    assert paid[0].tolist() == pytest.approx([*(low + (high - low) * mean for mean in means), 0])
    assert paid[1].tolist() == [0] * 4  # one right answer agrees with nobody


def test_the_frozen_start_pays_by_its_own_states_and_learns_nothing(started):
    """In the first step the policy is the frozen start, so that its states are those of the rollouts."""
    trainer, task = a_trainer("frozen start", started)
    prompts = [started[1](story.question)["input_ids"] for story in task.problems(0)]
    answers = task.problems(0)
    mine = trainer.roll_out(prompts, answers, trainer.random(clipo.ROLLOUT)).rollouts
    usual = a_trainer("", started)[0].roll_out(prompts, answers, trainer.random(clipo.ROLLOUT)).rollouts
    assert torch.equal(mine.tokens, usual.tokens)
    torch.testing.assert_close(mine.hidden, usual.hidden, atol=1e-4, rtol=1e-4)
    assert not list(trainer.head.parameters()) or trainer.config.head_steps == 0
    z = trainer.contrastive_step(mine.hidden, torch.tensor([[True, True, False, False]] * 2)).embedding
    centred = mine.hidden - mine.hidden.mean(1, keepdim=True)
    torch.testing.assert_close(z, torch.nn.functional.normalize(centred, dim=-1))


def test_the_papers_anchors_have_a_wrong_answer_in_their_group(started):
    correct = torch.tensor([[True, True, True, True], [True, True, False, False]])
    usual, papers = (a_trainer(kind, started)[0].parts.pairs(correct) for kind in ("", "paper's anchors"))
    assert usual.anchor.tolist() == correct.tolist()
    assert papers.anchor.tolist() == [[False] * 4, [True, True, False, False]]
    assert torch.equal(papers.positive, usual.positive) and torch.equal(papers.negative[1], usual.negative[1])


def test_without_a_frozen_start_there_is_nothing_to_agree_in(started):
    with pytest.raises(ValueError, match=r"beta is 0\.0, so that no frozen start is kept"):
        a_trainer("frozen start", started, beta=0.0)


def test_a_response_of_one_token_has_the_state_that_it_was_drawn_from(started):
    model, tokenizer = started
    prompt = tokenizer("Tom has 3 coins")["input_ids"]
    tokens, mask = torch.tensor([[5, 6, 1], [1, 1, 1]]), torch.tensor([[True, True, True], [True, False, False]])
    h = referees.frozen_states(model, prompt, tokens, mask)
    with torch.no_grad():
        states = model.base_model(torch.tensor([[*prompt, 5, 6, 1]])).last_hidden_state[0]
    torch.testing.assert_close(h[0], states[len(prompt) : len(prompt) + 2].mean(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(h[1], states[len(prompt) - 1], atol=1e-5, rtol=1e-4)
