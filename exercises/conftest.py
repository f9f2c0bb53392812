"""python -m pytest exercises/03_clipped_ratio      checks one answer; `exercises` all of them"""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
collect_ignore_glob = ["*/answer.py", "solutions/*", "checking.py", "plots.py"]


@pytest.fixture(autouse=True)
def the_same_random_numbers():
    torch.manual_seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    """An answer that is not written yet ends with one line, without source code."""
    try:
        return (yield)
    except NotImplementedError as reason:
        unwritten = str(reason)
    pytest.fail(unwritten, pytrace=False)


@pytest.fixture
def answer(request):
    """The answer that the check's folder is about."""
    from exercises.checking import answer_of

    return answer_of(request.path.parent.name)
