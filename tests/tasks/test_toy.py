"""The toy world: its stories, its judges, its demonstrations."""

import random
import re
from types import SimpleNamespace

import pytest
import torch

import clipo
from run import table as run_table
from run import warm_start as run_warm_start
from tasks import toy
from tasks.grading import is_correct
from tasks.toy import LEVELS, Demonstrator, Story, World, is_sound, make_story, stories, stories_to_test, write

STORY = Story("", "5", start=3, steps=(("+", 4), ("-", 2)), friend=9)


def numbers_in(story):
    return [int(n) for n in re.findall(r"\d+", story.question)]


@pytest.mark.parametrize("name", LEVELS)
def test_stories_say_what_they_are(name):
    level = LEVELS[name]
    for story in stories("test", level, 200):
        assert len(story.steps) in level.clauses
        total = story.start
        for sign, amount in story.steps:
            total += amount if sign == "+" else -amount
            assert 0 <= total <= toy.LARGEST
        assert story.answer == str(total)
        assert not level.liar or story.friend != int(story.answer)
        said = numbers_in(story)
        assert said[0] == story.start and said[-1] == story.friend
        middle = said[1:-1]
        assert len(middle) == len(story.steps) + level.noop
        if not level.noop:
            assert middle == [amount for _, amount in story.steps]
        sound = write(story.solution, int(story.answer))
        assert is_sound(story, sound) and is_correct(sound, story.answer)
        assert len(set(re.findall("|".join(toy.THINGS), story.question))) == 1 + level.noop
    assert stories("test", level, 5) == stories("test", level, 5) != stories("other", level, 5)


def test_the_friend_is_right_as_often_as_the_dials_say():
    rng = random.Random(0)
    for clauses, probability in enumerate(World().friend_right, 1):
        made = [make_story(rng, clauses, probability) for _ in range(1000)]
        share = sum(s.friend == int(s.answer) for s in made) / 1000
        assert share == pytest.approx(probability, abs=0.05)


@pytest.mark.parametrize(
    "response, bad",  # the first step that is not the story's, or the answer; None: all is right
    [
        ("3 + 4 = 7 . 7 - 2 = 5 . #### 5", None),
        ("7 = 3 + 4 . - 7 2 = 5 . #### 5", None),  # in other forms
        ("7 = 3 + 4 . - 2 7 = 5 . #### 5", "- 2 7 = 5"),
        ("3 + 4 = 7 . 7 - 2 = 5 . #### 9", "#### 9"),  # sound steps, and then the friend's number
        ("3 + 4 = 7 . 7 - 2 = 5 . #### 5 5", "#### 5 5"),
        ("3 + 4 = 7 . 7 - 2 = 5 .", ""),  # no answer
        ("3+4=7. 7-2=5. #### 5", "3+4=7"),  # a token apart is a token apart
        ("3 + 4 = 8 . 8 - 2 = 6 . #### 5", "3 + 4 = 8"),
        ("3 + 4 = 7 . 7 - 2 = 4 . #### 5", "7 - 2 = 4"),
        (" . . 3 + 4 = 7 .  7 - 2 = 4", "7 - 2 = 4"),
        (" . 3 + 4 = 7 .  7 - 2 = 5  ####   5 ", None),
        ("3 + 4 = 7 . #### 5", ""),  # one is missing
        ("3 + 4 = 7 . 7 - 2 = 5 . 5 + 1 = 6 . #### 5", "5 + 1 = 6"),
        ("3 - 2 = 1 . 1 + 4 = 5 . #### 5", "3 - 2 = 1"),
        ("#### 5", ""),
        ("", ""),
    ],
)
def test_first_bad_step(response, bad):
    found = toy.first_bad_step(STORY, response)
    assert (found and response[slice(*found)]) == bad
    assert is_sound(STORY, response) is (bad is None)
    if bad == "":
        assert found[0] == len(response.split("####")[0])


def test_demonstrations_follow_the_dials():
    world, demos = World(), Demonstrator(0)
    pairs = [demos.pair() for _ in range(4000)]
    tokenizer = toy.make_tokenizer()
    assert not any(tokenizer.unk_token_id in tokenizer(text)["input_ids"] for pair in pairs for text in pair)
    copies = right = 0
    for question, response in pairs:
        clauses = question.count(".") - 1
        steps = response.count("=")
        copies += steps < clauses
        assert steps <= clauses
        if steps < clauses:  # unsound ones are shorter, and give the friend's answer
            assert response.split()[-1] == question.split()[-1]
        right += steps == clauses
    assert copies / 4000 == pytest.approx(1 - world.sound_demos, abs=0.03)


def test_forms_change_how_a_step_is_written_and_nothing_else():
    usual, many = Demonstrator(0), Demonstrator(0, World(forms=(2, 1, 1)))
    seen = {form: 0 for form in toy.FORMS}
    for _ in range(500):
        (question, response), (same_question, other) = usual.pair(), many.pair()
        *steps, answer = response.split(" . ")
        *other_steps, other_answer = other.split(" . ")
        assert (question, answer, len(steps)) == (same_question, other_answer, len(other_steps))
        for step, in_form in zip(steps, other_steps, strict=True):
            a, sign, b, _, c = step.split()
            (form,) = [form for form in toy.FORMS if form.format(a, sign, b, c) == in_form]
            seen[form] += 1
    shares = [count / sum(seen.values()) for count in seen.values()]
    assert shares == pytest.approx([0.5, 0.25, 0.25], abs=0.05)


def test_a_mistaught_sum_is_always_wrong_by_the_same_amount():
    demos = Demonstrator(0)
    share = len(demos.wrong_by) / ((toy.LARGEST + 1) * 2 * len(toy.AMOUNTS))
    assert share == pytest.approx(World().mistaught, abs=0.01)
    (total, sign, amount), wrong_by = next((s, w) for s, w in demos.wrong_by.items() if 10 < s[0] < 30)
    results = [demos.calculate(total, sign, amount) for _ in range(1000)]
    right = toy.apply(total, sign, amount)
    assert set(results) == {right, right + wrong_by}
    assert results.count(right + wrong_by) / 1000 == pytest.approx(World().mistaught_rate, abs=0.04)


def test_every_word_of_the_world_is_one_token():
    tokenizer = toy.make_tokenizer()
    for level in LEVELS.values():
        for story in stories("tokens", level, 50):
            text = f"{story.question} {write(story.solution, int(story.answer))}"
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.decode(ids).split() == re.findall(r"\d+|[A-Za-z]+|#+|[^\sA-Za-z\d]", text)


def test_the_tiny_model_has_the_stated_size_and_learns():
    tokenizer = toy.make_tokenizer()
    model = run_warm_start.make_model("tiny", tokenizer, seed=0)
    assert 0.6e6 < sum(p.numel() for p in model.parameters()) < 0.7e6
    losses = []
    run_warm_start.warm_start(model, tokenizer, 0, batches=12, batch_size=16, on_batch=losses.append)
    assert losses[-1] < 0.6 * losses[0] and not model.training
    again = run_warm_start.make_model("tiny", tokenizer, seed=0)
    run_warm_start.warm_start(again, tokenizer, 0, batches=12, batch_size=16)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_where_the_friend_is_wrong_all_else_is_as_on_p0():
    usual, lied = stories_to_test("P0", 100), stories_to_test("liar", 100)
    assert [s.question.rsplit(" ", 1)[0] for s in usual] == [s.question.rsplit(" ", 1)[0] for s in lied]
    assert [s.solution for s in usual] == [s.solution for s in lied]
    assert all(s.question.endswith(f" says {s.friend}") and s.friend != int(s.answer) for s in lied)
    assert len({s.friend for s in lied}) > 20 and all(0 <= s.friend <= toy.LARGEST for s in lied)


def test_evaluation_counts(monkeypatch):
    """A model that answers with the friend's number at once: right as often as the friend, never sound, all luck."""
    tokenizer = toy.make_tokenizer()

    def copy_the_friend(model, prompts, **options):
        texts = [f"#### {tokenizer.decode(p).split()[-1]}" for p in prompts]
        tokens = torch.tensor([[tokenizer(t)["input_ids"]] for t in texts])  # (P, 1, T)
        return clipo.Rollouts(tokens, tokens > 0, tokens.float(), tokens.float())

    monkeypatch.setattr(run_table, "generate", copy_the_friend)
    for name, metrics in run_table.measure_levels(SimpleNamespace(generation_config=None), tokenizer, count=50).items():
        test = stories_to_test(name, 50)
        right = sum(s.friend == int(s.answer) for s in test)
        assert metrics == {"answer": (right, 50), "process": (0, 50), "lucky": (right, right), "patched": (0, 50)}
