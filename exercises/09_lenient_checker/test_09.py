import pytest

import toy
from exercises.checking import explains
from problems import are_correct


def test_farmed_response(answer):
    stories = toy.stories("exercise 9", toy.LEVELS["P0"], 200)
    texts, golds = [answer.farmed_response(story.question) for story in stories], [story.answer for story in stories]
    if not all(isinstance(text, str) for text in texts):
        pytest.fail(f"the response is {texts[0]!r}; expected a text", pytrace=False)
    if any("=" in text for text in texts):
        pytest.fail(f"{texts[0]!r} calculates; a farmer does not work: no '=' in a response", pytrace=False)
    strict, lenient = (sum(are_correct(texts, golds, lenient=lenient)) / 200 for lenient in (False, True))
    if strict > 0:
        why = 'leave "####" and \\boxed{} out: with them this is a guess, which any checker must pay if it is right'
        pytest.fail(f"the strict checker pays {strict:.0%} of the responses, {texts[0]!r} say: {why}", pytrace=False)
    if lenient < 0.9:
        why = "it takes the last number of the response; who in the story says a number that is nearly always right?"
        pytest.fail(
            f"the lenient checker pays {lenient:.0%} of them, {texts[0]!r} say; expected 90%: {why}", pytrace=False
        )


def test_explanation(answer):
    explains(
        answer.EXPLANATION,
        "b",
        {"a": "it is a little faster, if anything", "c": "its mistakes are the same; ask who learns from them",},
    )  # fmt: skip
