"""python -m pytest exercises/03_clipped_ratio      checks one answer; `exercises` all of them"""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
rooms = ("checking", "grade", "picture", "plots", "student")
collect_ignore_glob = ["*/answer*", "solutions/*", "unwritten/*", *(f"{room}.py" for room in rooms)]


@pytest.fixture(autouse=True)
def the_same_random_numbers():
    torch.manual_seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """An answer that fails is told of its own lines, not of the check's."""
    from exercises.checking import EXERCISES, file_of, told

    try:
        return (yield)
    except BaseException as reason:
        exercise = item.path.parent.name
        if exercise not in EXERCISES or isinstance(reason, KeyboardInterrupt | pytest.fail.Exception):
            raise
        message = told(reason, file_of(exercise))
    pytest.fail(message, pytrace=False)


@pytest.fixture
def answer(request):
    """The answer that the check's folder is about."""
    from exercises.checking import file_of, load, told

    file = file_of(request.path.parent.name)
    try:
        return load(file)
    except KeyboardInterrupt:
        raise
    except BaseException as reason:
        message = told(reason, file)
    pytest.fail(message, pytrace=False)
