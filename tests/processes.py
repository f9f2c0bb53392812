"""Commands of this repository in processes of their own, without the seconds of imports that each begins with.

A server of multiprocessing's imports torch and transformers once, and is forked for each command. That then runs as a
script or a module does: as __main__, with its own arguments, folder, environment and output. What has to do with how an
interpreter begins or ends is tested by `subprocess`, and so is everything where there is no such server.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ["torch", "transformers.models.qwen2.modeling_qwen2", "transformers.models.auto", "matplotlib.pyplot"]

forks = sys.platform == "linux"
if forks:
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(LIBRARIES)


class Command:
    """`python ARGUMENTS`, begun: like a `subprocess.Popen` whose output goes to files."""

    def __init__(self, *arguments, cwd: Path | None = None, env: Mapping[str, str] | None = None):
        self.arguments = list(map(str, arguments))
        self.files = [tempfile.TemporaryFile("w+", encoding="utf-8") for _ in range(2)]
        self.places = [f"/proc/{os.getpid()}/fd/{file.fileno()}" for file in self.files]
        where, environment = str(cwd or os.getcwd()), dict(os.environ if env is None else env)
        self.process = server.Process(target=become, args=(self.arguments, where, environment, self.places))
        self.process.start()
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(self.arguments, timeout)
        return self.process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        for file in self.files:
            file.seek(0)
        return tuple(file.read() for file in self.files)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.process.kill()

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode


def run(*arguments, **more) -> subprocess.CompletedProcess:
    """The same, to its end."""
    if not forks:
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False, **more)
    command = Command(*arguments, **more)
    said, complained = command.communicate()
    return subprocess.CompletedProcess(command.arguments, command.returncode, said, complained)


def is_ours(place: Path) -> bool:
    """A folder of this repository? Not its virtual environment, which README puts into it."""
    return place.is_relative_to(ROOT) and "site-packages" not in place.parts


def become(arguments: list[str], where: str, environment: dict[str, str], places: list[str]) -> None:
    """In the forked process: what `python ARGUMENTS` would be there."""
    for number, place in zip((1, 2), places, strict=True):
        os.dup2(os.open(place, os.O_WRONLY | os.O_APPEND), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(where)
    os.environ.clear()
    os.environ.update(environment)
    if threads := environment.get("OMP_NUM_THREADS"):  # read when torch was imported
        sys.modules["torch"].set_num_threads(int(threads))
    if arguments[0] == "-B":
        sys.dont_write_bytecode = True
        arguments = arguments[1:]
    libraries = [place for place in sys.path if place and not is_ours(Path(place))]
    if arguments[0] == "-m":
        sys.argv[:], sys.path[:] = arguments[1:], [where, *libraries]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.argv[:], sys.path[:] = ["-c", *arguments[2:]], [where, *libraries]
        exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv[:], sys.path[:] = arguments, [str(Path(arguments[0]).parent), *libraries]
        runpy.run_path(arguments[0], run_name="__main__")
