from exercises.checking import call, explains, number, predicted, wrong
from exercises.plots import paid_by
from tasks import toy
from tasks.grading import are_correct


def test_prediction(answer):
    predicted(answer.PREDICTION, 0, 1)


def test_farmed_response(answer):
    stories = toy.stories("exercise 9", toy.LEVELS["P0"], 200)
    texts, golds = [call(answer.farmed_response, story.question) for story in stories], [s.answer for s in stories]
    if not all(isinstance(text, str) for text in texts):
        wrong(f"the response is {texts[0]!r}; expected a text")
    if any("=" in text for text in texts):
        wrong(f"{texts[0]!r} calculates; a farmer does not work: no '=' in a response")
    strict, lenient = (sum(are_correct(texts, golds, lenient=lenient)) / 200 for lenient in (False, True))
    if strict > 0:
        why = 'leave "####" and \\boxed{} out: with them this is a guess, which any checker must pay if it is right'
        wrong(f"the strict checker pays {strict:.0%} of the responses, {texts[0]!r} say: {why}")
    if lenient < 0.8:
        why = "it takes the last number of the response; who in the story says a number that is mostly right?"
        wrong(f"the lenient checker pays {lenient:.0%} of them, {texts[0]!r} say; expected 80%: {why}")


def test_how_many_clauses_it_takes(answer):
    clauses = number(answer.CLAUSES, "CLAUSES", 1, 5)
    if clauses != int(clauses):
        wrong(f"CLAUSES is {clauses}; expected a whole number")
    paid = paid_by(answer.farmed_response, int(clauses))["lenient"]
    if paid >= 0.5:
        wrong(
            f"CLAUSES is {clauses}, and there farming is paid for {paid:.0%} of the stories; expected fewer than half"
        )
    if clauses > 1 and (before := paid_by(answer.farmed_response, int(clauses) - 1)["lenient"]) < 0.5:
        wrong(
            f"CLAUSES is {clauses}, but with one clause less it is {before:.0%} already; the least number is asked for"
        )


def test_explanation(answer):
    explains(
        answer.EXPLANATION,
        "b",
        {"a": "it is a little faster, if anything", "c": "its mistakes are the same; ask who learns from them"},
    )
