"""Farming a lenient answer checker."""

PREDICTION: float | None = 0.9
CLAUSES: int = 4
EXPLANATION: str | None = "b"


def farmed_response(question: str) -> str:
    """What Ann says."""
    return "Ann says " + question.split()[-1]
