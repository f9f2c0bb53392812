"""A run's folder: save a training state, go on from it, keep the logs.

OUT/                          the newest model: config.json, model.safetensors, tokenizer.json, ...
    head.safetensors          its contrastive head
    settings.json             everything that was chosen, to run it again, and checksums of what it began with
    metrics.jsonl             a line per step
    rollouts.jsonl            some groups of each step
    evaluation.json           on the toy world: the table at the end
    report.html               a page that shows all this
    lock                      held by the process that writes the run
    checkpoints/step-000060/  complete training states, the last two: model, tokenizer, head, optimisers, checksums
    eval/, tsne.npz, tsne.png what eval.py and tsne.py make of it
OUT/../warm-start-.../        on the toy world: the model that runs begin with, made once
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from border import UserError, from_json, has_type, in_short, misfit
from clipo import CLIPO
from config import CLIPOConfig
from run.models import load_model

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

KEPT = 2  # checkpoints
SEAL = "state.json"  # of a checkpoint: its step, and the checksums of its other files
LOGS = ("metrics.jsonl", "rollouts.jsonl")
OF_A_SAVE = re.compile(r"step-\d{6,}(\.writing|\.removing)?")  # a save makes, moves and removes nothing else


# ----------------------------------------------------------------------------------------------------
# Training states. A pulled plug costs the steps since the last one, no more: each is written aside, flushed to the
# disk, sealed with the checksums of its files, and renamed when whole.
# ----------------------------------------------------------------------------------------------------


def state_folder(out: Path, steps_done: int) -> Path:
    """Where the training state after so many steps is, or would be."""
    return out / "checkpoints" / f"step-{steps_done:06d}"


def save(trainer: CLIPO, out: Path) -> Path:
    """Write a complete training state into `out`/checkpoints and publish its model in `out`; returns its folder.

    Raises OSError, with everything that was saved before still there.
    """
    folder = state_folder(out, trainer.steps_done)
    for leftover in folder.parent.glob("step-*.*"):  # of a save that was cut short
        if OF_A_SAVE.fullmatch(leftover.name):
            shutil.rmtree(leftover)
    aside = folder.with_name(folder.name + ".writing")
    aside.mkdir(parents=True)
    save_model(trainer.policy, trainer.tokenizer, aside)
    save_tensors(trainer.head.state_dict(), aside / "head.safetensors")
    save_tensors(optimizer_tensors(trainer), aside / "optimizers.safetensors")
    for log in LOGS:  # the lines that belong to this state, before the state itself
        if (out / log).exists():
            flush(out / log)
    files = {file.relative_to(aside).as_posix(): checksum(file) for file in sorted(aside.rglob("*")) if file.is_file()}
    write_text(aside / SEAL, json.dumps({"steps_done": trainer.steps_done, "sha256": files}, indent=1))
    for file in files:
        flush(aside / file)
    flush(aside)
    remove(folder)
    aside.rename(folder)
    flush(folder.parent)
    publish(folder, out)
    for old in checkpoints(out)[:-KEPT]:
        remove(old)
    return folder


def optimizer_tensors(trainer: CLIPO) -> dict[str, Tensor]:
    """The moments and step counts of both optimisers by name, "policy/7/exp_avg" say."""
    return {
        f"{name}/{i}/{kind}": value.contiguous()
        for name, optimizer in (("policy", trainer.policy_optimizer), ("head", trainer.head_optimizer))
        for i, moments in optimizer.state_dict()["state"].items()
        for kind, value in moments.items()
    }


def checksum(file: Path) -> str:
    with plain(file).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Wait until a file, or which files a folder has, is on the disk. Windows opens no folder, and waits for none."""
    try:
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # Windows flushes only what one may write
    except PermissionError:
        if path.is_dir():
            return
        raise
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(folder: Path) -> None:
    """Take a folder away; cut short half-way, it no longer has the name of a checkpoint."""
    if folder.exists():
        shutil.rmtree(folder.rename(folder.with_name(folder.name + ".removing")))


def publish(folder: Path, out: Path) -> None:
    """Let `out` itself open with from_pretrained: hard links to the checkpoint's files, which cost no space."""
    for file in folder.iterdir():
        if file.name in (SEAL, "optimizers.safetensors") or not file.is_file():
            continue
        link = out / (file.name + ".new")
        link.unlink(missing_ok=True)
        try:
            os.link(file, link)
        except OSError:  # a file system without hard links
            shutil.copyfile(file, link)
        link.replace(out / file.name)


def checkpoints(out: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [f for f in (out / "checkpoints").glob("step-*") if OF_A_SAVE.fullmatch(f.name)]
    return sorted((f for f in found if f.is_dir() and not f.suffix), key=lambda f: int(f.name.removeprefix("step-")))


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint: a file that is missing, or is not what was written. None if it is whole."""
    try:
        seal = from_json(plain(folder / SEAL).read_text(encoding="utf-8"))
        sums = {"head.safetensors": str, "optimizers.safetensors": str}
        if wrong := misfit(seal, {"steps_done": int, "sha256": sums}):
            raise ValueError(wrong)
        sealed = seal["sha256"]
        unsealed = [file.name for file in folder.glob("*.safetensors") if file.name not in sealed]
        outside = [name for name in sealed if Path(name).is_absolute() or ".." in Path(name).parts]
        if unsealed or outside or folder != state_folder(folder.parents[1], seal["steps_done"]):
            return f"{SEAL} is damaged"
        for name, expected in sealed.items():
            if checksum(folder / name) != expected:
                return f"{name} is damaged"
    except FileNotFoundError as reason:
        return f"{Path(reason.filename).name} is missing"
    except (OSError, ValueError) as reason:
        return f"{SEAL} cannot be read ({reason})"
    return None


def newest_whole(out: Path) -> Path | None:
    """The newest checkpoint that is as it was written; damaged ones are named. None if the run has saved none yet.

    Raises UserError if it has saved some and all are damaged.
    """
    found = checkpoints(out)
    for folder in reversed(found):
        if (wrong := damage(folder)) is None:
            return folder
        before = "the one before it is used" if folder != found[0] else "there is none before it"
        print(f"{folder}: {wrong}; {before}", file=sys.stderr)
    if found:
        raise UserError(f"{out}: all of its {len(found)} checkpoints are damaged; expected a whole one to go on from")
    return None


def resume(trainer: CLIPO, folder: Path) -> None:
    """Bring a freshly made trainer, of the run's first model and settings, to the state in a folder; UserError."""
    model, _ = load_model(str(folder), "cpu")  # a GPU need not hold it twice
    device = str(trainer.policy.device)
    try:
        trainer.policy.load_state_dict(model.state_dict())
        trainer.head.load_state_dict(load_file(folder / "head.safetensors", device=device))
    except RuntimeError as reason:  # its files are whole; settings.json has no checksum
        raise UserError(
            f"{folder} is of another model than the run's settings.json; expected both of one run"
        ) from reason
    except (OSError, SafetensorError) as reason:
        raise UserError(
            f"{folder}/head.safetensors cannot be used ({reason}); expected what train.py wrote"
        ) from reason
    file, moments = folder / "optimizers.safetensors", {"policy": {}, "head": {}}
    optimizers = {"policy": trainer.policy_optimizer, "head": trainer.head_optimizer}
    try:
        for key, value in load_file(file, device=device).items():
            name, i, kind = key.split("/")
            moments[name].setdefault(int(i), {})[kind] = value
        for name, optimizer in optimizers.items():
            check_moments(moments[name], [p for group in optimizer.param_groups for p in group["params"]])
    except (OSError, SafetensorError, ValueError, KeyError) as reason:
        raise UserError(f"{file} cannot be used ({in_short(reason)}); expected what train.py wrote") from reason
    for name, optimizer in optimizers.items():
        optimizer.load_state_dict({**optimizer.state_dict(), "state": moments[name]})
    trainer.steps_done = json.loads((folder / SEAL).read_text(encoding="utf-8"))["steps_done"]


def check_moments(moments: dict[int, dict[str, Tensor]], parameters: list[Tensor]) -> None:
    """Raise ValueError for what AdamW cannot have kept of these parameters: from then on it would break weights."""
    for i, kept in moments.items():
        if not 0 <= i < len(parameters) or kept.keys() != {"step", "exp_avg", "exp_avg_sq"}:
            raise ValueError(f"parameter {i} has {', '.join(sorted(kept))}")
        for kind, value in kept.items():
            shape = torch.Size() if kind == "step" else parameters[i].shape
            low = {"step": 1, "exp_avg": -math.inf, "exp_avg_sq": 0}[kind]
            if value.shape != shape or not value.is_floating_point():
                raise ValueError(f"{kind} of parameter {i} is {value.dtype} of shape {tuple(value.shape)}")
            if not (value.isfinite().all() and (value >= low).all()):
                raise ValueError(f"{kind} of parameter {i} is NaN, infinite or too small")


def go_on(trainer: CLIPO, out: Path, resume_it: bool) -> None:
    """Bring a freshly made trainer to the newest checkpoint, if a run is resumed and has one, and the logs with it.

    A run that was stopped before its first save begins again. One that has published a model had saved: if its
    checkpoints are gone, beginning again would empty its logs. Raises UserError.
    """
    if saved := newest_whole(out) if resume_it else None:
        resume(trainer, saved)
        publish(saved, out)
    elif resume_it and any((out / name).exists() for name in ("config.json", "head.safetensors")):
        raise UserError(
            f"{out} has saved a model, but {out / 'checkpoints'} holds no checkpoint; expected those of the run, or "
            f"another --out, with --model {out} to begin with what it learnt"
        )
    for file in LOGS:
        keep_until(out / file, trainer.steps_done)


# ----------------------------------------------------------------------------------------------------
# Whose folder is it? What is not ours is neither written over nor written through.
# ----------------------------------------------------------------------------------------------------


def refuse_odd(out: Path) -> None:
    """A folder from elsewhere could make us write through a link, or wait for ever at a pipe. Raises UserError."""
    for path in out.rglob("*"):
        if path.is_symlink():
            raise UserError(f"{path} is a link to {os.readlink(path)}; expected a run's folder without links")
        if not path.is_dir():
            plain(path)


def refuse_others(out: Path, ours: Iterable[str]) -> None:
    """Raise UserError if a folder holds anything but files of these names: it is somebody else's."""
    known = {"lock", *ours}
    for path in sorted(out.iterdir()) if out.is_dir() else ():
        if path.name.removesuffix(".new") not in known:
            raise UserError(f"{out} holds {path.name}, which is not of this command; expected a new or empty --out")


def refuse_used(out: Path) -> None:
    """Raise UserError if a new run cannot begin in this folder. What a run left that never began is in nobody's way."""
    if (out / "settings.json").exists() or checkpoints(out):
        raise UserError(f"{out} already holds a run; go on with --resume --out {out}, or choose another --out")
    ours = ["settings.json", *(log for log in LOGS if not whole_lines(out / log))]
    if all(OF_A_SAVE.fullmatch(f.name) for f in out.glob("checkpoints/*")):  # of saves that were cut short
        ours.append("checkpoints")
    refuse_others(out, ours)


def refuse_inside(out: Path, model: str | None) -> None:
    """Raise UserError if a run would be written into the folder of the model that it begins with, or of its run."""
    if out.name.startswith("warm-start-"):
        raise UserError(f"--out {out} has the name of a warm start, which is made once for many runs; expected another")
    if model and (Path(model) / "config.json").is_file():
        start, place = Path(model).resolve(), out.resolve()
        whole = start.parents[1] if start.parent.name == "checkpoints" else start
        if place == whole or whole in place.parents:
            raise UserError(f"--out {out} lies in the model that the run begins with, {model}; expected another --out")


@contextmanager
def only_one(lock: Path, wait: str = ""):
    """In here, no other process holds this lock, a file. If one does: UserError. With `wait`, it says that and waits.

    The system lets go of a lock when its process ends, however it ends. On Windows nothing is locked.
    """
    with plain(lock).open("a") as handle:
        if fcntl is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as taken:
                if not wait:
                    raise UserError(
                        f"{lock.parent} is being written by another process; expected another --out, or to wait for it"
                    ) from taken
                print(wait, file=sys.stderr)
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield


# ----------------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------------


def plain(file: Path) -> Path:
    """The file, if it is one or not there yet. Who opens a pipe waits for ever, and a device has no end. UserError."""
    if file.exists() and not file.is_file():
        raise UserError(f"{file} is no plain file; expected what train.py or eval.py wrote")
    return file


def read_settings(run: Path) -> dict | None:
    """What a run was begun with ("model", "data", "config", ...); None for a folder (or name) that is no run.

    A hyperparameter that is newer than the run has its default. A start that is not where it was is looked for beside
    the run. Raises UserError for settings that cannot be read.
    """
    file = run / "settings.json"
    if not file.is_file():
        return None
    settings = read_json(file, {"model": str, "data": str, "config": dict})
    config, names = settings["config"], [f.name for f in fields(CLIPOConfig)]
    try:
        checked = CLIPOConfig(**{name: config[name] for name in names if name in config})
    except ValueError as reason:
        raise UserError(f"{file} cannot be used ({reason}); expected what train.py wrote") from reason
    if not settings["model"]:
        raise UserError(f"{file} cannot be used (model is empty); expected what train.py wrote")
    known = settings.get("checksums") or Path(settings["model"]).name.startswith("warm-start-")
    if known and Path(settings["model"]).is_absolute() and not Path(settings["model"]).exists():
        beside = run.resolve().parent / Path(settings["model"]).name
        settings["model"] = str(beside) if beside.is_dir() else settings["model"]  # both were moved
    return {**settings, "config": {**config, **asdict(checked)}}


def read_json(file: Path, shape):
    """What a JSON file of ours holds, in the shape that `misfit` describes. Raises UserError."""
    try:
        value = from_json(plain(file).read_text(encoding="utf-8"))
        if wrong := misfit(value, shape):
            raise ValueError(wrong)
    except (OSError, ValueError) as reason:
        raise UserError(f"{file} cannot be read ({reason}); expected what train.py wrote") from reason
    return value


def write_text(file: Path, text: str) -> None:
    """Put a text in place of a file, at once and for good; what the old name also pointed to is left alone."""
    aside = file.with_name(file.name + ".new")
    aside.unlink(missing_ok=True)
    with aside.open("x", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    aside.replace(file)


@contextmanager
def saving(place: Path) -> Iterator[None]:
    """In here, what safetensors and tokenizers, written in Rust, make of a full disk becomes OSError."""
    try:
        yield
    except Exception as reason:
        if isinstance(reason, OSError) or "os error" not in str(reason):
            raise
        raise OSError(None, str(reason), str(place)) from reason


def save_model(model, tokenizer, folder: Path) -> None:
    """As save_pretrained, but for all to read. Raises OSError."""
    with saving(folder):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        let_others_read(file)


def save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """As save_file, but for all to read. Raises OSError."""
    with saving(file):
        save_file({name: value.contiguous() for name, value in tensors.items()}, file)
    let_others_read(file)


def let_others_read(file: Path) -> None:
    """Give a file of safetensors, which keeps it to its owner, the mode that files get here."""
    mask = os.umask(0)  # there is no other way to read it
    os.umask(mask)
    file.chmod(0o666 & ~mask)


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """Put tensors in place of a file, at once. Raises OSError."""
    aside = file.with_name(file.name + ".new")
    try:
        save_tensors(tensors, aside)
    except OSError:
        aside.unlink(missing_ok=True)  # a full disk has no room for half of it
        raise
    flush(aside)
    aside.replace(file)


def append_line(file: Path, row: dict) -> None:
    """Add one line of JSON."""
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_lines(file: Path, shape: dict | None = None) -> list[dict]:
    """All whole lines of a JSONL file ([] where there is none); one that a kill cut short is skipped.

    Raises UserError for a line that is no JSON, or no object of the `shape` that `misfit` describes, by its number.
    """
    rows = []
    for number, line in enumerate(whole_lines(file), 1):
        try:
            rows.append(from_json(line))
        except ValueError as reason:
            raise UserError(f"{file}, line {number} is no JSON ({reason}); expected an object per line") from reason
        if wrong := misfit(rows[-1], shape or {}):
            raise UserError(f"{file}, line {number}: {wrong}; expected what train.py or eval.py wrote")
    return rows


def whole_lines(file: Path) -> list[str]:
    return plain(file).read_text(encoding="utf-8", errors="replace").split("\n")[:-1] if file.exists() else []


def write_lines(file: Path, rows: list[dict]) -> None:
    """Put these rows in place of a JSONL file, at once."""
    write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def keep_until(file: Path, step: int) -> None:
    """Drop the lines of later steps, which a resumed run will write again.

    Those up to `step` were on the disk before its checkpoint was; what stands behind them may be anything. One among
    them that is damaged is left out, and said.
    """
    kept, damaged, last = [], [], 0
    for number, line in enumerate(whole_lines(file), 1):
        try:
            row = from_json(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not has_type(row.get("step"), int):
            damaged.append(number)
        elif last <= row["step"] <= step:
            kept.append(row)
            last, wrong = row["step"], damaged.copy()
    if kept and wrong:
        print(f"{file}: line {', '.join(map(str, wrong))} is damaged and left out", file=sys.stderr)
    write_lines(file, kept)
