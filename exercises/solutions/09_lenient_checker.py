"""Farming a lenient answer checker."""

EXPLANATION: str | None = "b"


def farmed_response(question: str) -> str:
    """What Ann says."""
    return "Ann says " + question.split()[-1]
