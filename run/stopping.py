"""How a run ends early: Ctrl-C, a closed terminal, a polite kill, a full disk, too little memory, a broken weight."""

from __future__ import annotations

import signal
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from border import UserError, in_short
from engine.graphs import CaptureFailed, ran_out_of_memory
from engine.guard import BrokenWeights, OutOfMemory

HANG_UP = getattr(signal, "SIGHUP", -1)  # not on Windows


class StopAsked:
    """Ctrl-C, a polite kill, a closed terminal. While something is at work (`finishing`) the first one only raises a
    flag; otherwise, and the second time, it stops at once by KeyboardInterrupt. Afterwards all is as it was."""

    def __init__(self):
        self.asked, self.hung_up, self.at_work = False, False, ""

    def __enter__(self) -> StopAsked:
        numbers = [signal.SIGINT, signal.SIGTERM]
        if HANG_UP > 0 and signal.getsignal(HANG_UP) != signal.SIG_IGN:  # nohup means to go on
            numbers.append(HANG_UP)
        self.before = {number: signal.signal(number, self) for number in numbers}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def __call__(self, number, frame):
        if number == HANG_UP:
            if self.hung_up:  # a terminal that closes sends it twice, by itself and by its shell
                return
            self.hung_up = True
        if self.asked or not self.at_work:
            raise KeyboardInterrupt
        self.asked = True
        tqdm.write(f"stopping after this {self.at_work} (once more: at once, without saving)")

    @contextmanager
    def finishing(self, at_work: str):
        """What is at work in here is finished before a stop is obeyed; who does it looks at `asked`."""
        self.at_work = at_work
        try:
            yield
        finally:
            self.at_work = ""


@contextmanager
def as_user_errors(out: Path):
    """In here, what a folder, a GPU or too little memory does to a run becomes UserError."""
    try:
        yield
    except OSError as reason:
        why = f"{reason.filename or out}: {reason.strerror or reason}"
        raise UserError(f"{why}; expected a folder with room that can be written; what was saved stays") from reason
    except CaptureFailed as reason:
        raise UserError(f"--cuda-graphs: {reason}; leave it out, and rollouts go on without") from reason
    except BrokenWeights as reason:
        raise UserError(f"{reason}; what was saved stays; expected a smaller --lr or --head-lr") from reason
    except RuntimeError as reason:
        if not (isinstance(reason, OutOfMemory) or ran_out_of_memory(reason)):
            raise
        why = f"out of memory: {in_short(reason)}"
        raise UserError(
            f"{why}; expected a smaller --max-new-tokens or model, or more memory; what was saved stays"
        ) from reason
