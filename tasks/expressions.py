"""Expressions compared by math-verify, in processes of their own that the kernel ends."""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Sequence
from contextlib import suppress

CAN_FORK = hasattr(os, "fork")


class Referee:
    """Compares expressions by math-verify, safely: in processes that the kernel ends.

    math-verify can take seconds and gigabytes over nine characters, and its own time-out works in the main thread
    only. So a server process (this file, run as a script) imports it once and compares the pairs in children that it
    forks. An alarm ends a child SECONDS after it began with a pair, and it cannot allocate more than BYTES: the pair
    over which it ended is wrong.

    Windows knows no fork. There the server compares by itself, a pair at a time, and is ended over one that takes
    too long; the next one waits until another has started. No limit is set to its memory but by those SECONDS.
    """

    SECONDS = 0.7
    BYTES = 2**31
    COMMAND = (sys.executable, __file__)

    def __init__(self):
        self.lock = threading.Lock()
        self.server: subprocess.Popen | None = None

    def start(self) -> None:
        """Run the server, unless it runs. Raises RuntimeError if it cannot be, for without it all would be wrong."""
        if self.server is not None and self.server.poll() is None:
            return
        self.server = subprocess.Popen(
            self.COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )
        if self.server.stdout.readline() != "ready\n":  # after a second or so: it imports math-verify
            raise RuntimeError("math-verify cannot be imported (the reason stands above); install requirements.txt")

    def compare(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """For each (answer, gold): are they equal?"""
        if not pairs:
            return []
        with self.lock:
            if not CAN_FORK:
                return [self.ask_in_time(pair) for pair in pairs]
            if (verdicts := self.ask(pairs)) is None:
                warnings.warn(f"the grading process ended; {len(pairs)} answers count as wrong", stacklevel=2)
            return verdicts or [False] * len(pairs)

    def ask_in_time(self, pair: tuple[str, str]) -> bool:
        """The verdict on one pair, of a server that is ended if it takes longer than SECONDS."""
        self.start()  # which takes time of its own
        alarm = threading.Timer(self.SECONDS, self.stop)
        alarm.start()
        try:
            return self.ask([pair]) == [True]
        finally:
            alarm.cancel()
            alarm.join()  # if it rings at this moment, the server is gone before the next pair

    def ask(self, pairs: Sequence[tuple[str, str]]) -> list[bool] | None:
        """The server's verdicts; None if it ended. The next call starts another."""
        self.start()
        try:
            self.server.stdin.write(json.dumps(pairs) + "\n")
            self.server.stdin.flush()
            return json.loads(self.server.stdout.readline())
        except (OSError, ValueError):
            self.stop()
            return None

    def stop(self) -> None:
        if self.server is not None:
            self.server.kill()
            self.server.wait()


referee = Referee()
atexit.register(referee.stop)


def serve() -> None:
    """The server: reads a line of pairs, writes a line of verdicts, until its input ends."""
    import gc
    import logging

    logging.disable()  # math-verify warns that its time-outs are off
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    for gold, answer in (("\\frac{x+1}{2}", "\\frac{x}{2}"), ("[1,2)", "(1,2)"), ("\\{1,\\sqrt{2}\\}", "x=3,y=\\pi")):
        expressions_equal(answer, gold)  # imports and caches that every child then has ready
    gc.freeze()  # or every child's garbage collection would copy the memory that it shares
    print("ready", flush=True)
    for line in sys.stdin:
        pairs = json.loads(line)
        print(json.dumps(judge(pairs) if CAN_FORK else [is_equal(*pair) for pair in pairs]), flush=True)


def judge(pairs: Sequence[Sequence[str]]) -> list[bool]:
    """The verdict on each pair, from as many children at a time as there are cores, each with 32 pairs at most."""
    verdicts = [False] * len(pairs)
    waiting = [(first, min(first + 32, len(pairs))) for first in range(0, len(pairs), 32)]
    working: dict[int, tuple[int, int, int]] = {}  # process: its pipe, and from which to which pair
    while waiting or working:
        while waiting and len(working) < (os.cpu_count() or 1):
            first, end = waiting.pop()
            pipe, write = os.pipe()
            pid = os.fork()
            if pid == 0:
                compare_or_die(pairs[first:end], write)
            os.close(write)
            working[pid] = pipe, first, end
        pid, _ = os.wait()
        if pid not in working:  # somebody else's child
            continue
        pipe, first, end = working.pop(pid)
        said = os.read(pipe, 32)
        os.close(pipe)
        for i, verdict in enumerate(said, first):
            verdicts[i] = verdict == ord("1")
        if first + len(said) < end:  # it died over the next pair, which is wrong; another goes on behind it
            waiting.append((first + len(said) + 1, end))
    return verdicts


def compare_or_die(pairs: Sequence[Sequence[str]], pipe: int) -> None:
    """In a child: write "1" or "0" for each pair. A pair that takes too long or too much memory ends the process."""
    import resource

    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    with suppress(ValueError, OSError):  # macOS knows no such limit
        resource.setrlimit(resource.RLIMIT_AS, (Referee.BYTES, Referee.BYTES))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    try:
        for answer, gold in pairs:
            signal.setitimer(signal.ITIMER_REAL, Referee.SECONDS)
            os.write(pipe, b"1" if is_equal(answer, gold) else b"0")
    finally:
        os._exit(0)


def is_equal(answer: str, gold: str) -> bool:
    """`expressions_equal`, where what cannot be read is not right."""
    with suppress(Exception):
        return bool(expressions_equal(answer, gold))
    return False


def expressions_equal(answer: str, gold: str) -> bool:
    """Are two LaTeX expressions equal for math-verify? May take any time and raise anything."""
    from math_verify import LatexExtractionConfig, parse, verify

    # None: no time-outs of its own, which would put another alarm in place of ours.
    # Nor its search for a number or a string anywhere in what it cannot read.
    reading = {"extraction_config": [LatexExtractionConfig()], "fallback_mode": "no_fallback", "parsing_timeout": None}
    sides = [parse(f"${side}$", **reading) for side in (gold, answer)]
    numbers = [value[0].doit() for value in sides if value and hasattr(value[0], "doit")]
    if len(numbers) == 2 and all(getattr(number, "is_Rational", False) for number in numbers):
        return numbers[0] == numbers[1]  # for `verify`, which rounds, 1/2^98 is 2/2^98
    return verify(*sides, timeout_seconds=None)


if __name__ == "__main__":
    serve()
