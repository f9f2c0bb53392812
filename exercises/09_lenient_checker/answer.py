"""Exercise 9, an experiment: farming a lenient answer checker (tasks/grading.py, extract_answer).

The strict checker takes what stands in \\boxed{} or after "####". The lenient one, where neither is there, takes the
last number of the text. A policy finds out what pays. Write down what it would find on the toy world's short stories:

    Tom has 3 coins. Tom finds 4 coins. Tom gives 2 coins. How many coins does Tom have now? Ann says 5

without calculating anything, and without an answer that the strict checker would take.

Check it with: python -m pytest exercises/09_lenient_checker      See it with: python -m exercises.plots 9
"""

# First guess. Farming is written for short stories. Which share of it does the lenient checker pay on stories of five
# clauses? (The story above has two: finds 4, gives 2.) From 0 to 1.
PREDICTION: float | None = None


def farmed_response(question: str) -> str:
    """A response that is paid by the lenient checker for at least 4 stories in 5, and by the strict one for none."""
    raise NotImplementedError("write farmed_response in exercises/09_lenient_checker/answer.py; hints.md helps")


# Now look at the plot. Then change this number, 1 to 5, and draw it again: what is the least number of clauses with
# which farming is paid for fewer than half of the stories?
CLAUSES: int = 2

# Why has train.py no --lenient, when eval.py has it?
# "a": the lenient checker is slower.  "b": evaluation reports what a model does; a reward is what it will do next.
# "c": the lenient checker makes mistakes in evaluation only.
EXPLANATION: str | None = None
