"""What a run computes: from its options, or from the settings.json of the run that goes on."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch

import variants
from border import OptionParser, UserError, check_numbers, check_types, from_json
from config import ENGINES, ONLY_SPEED, TRACKS, CLIPOConfig, add_options, config_from
from run import folder
from tasks.data import BENCHMARKS, TRAINING_SETS, check_source
from tasks.toy import SIZES, World


@dataclass
class Settings:
    """All that decides what a run computes; kept in its folder as settings.json."""

    model: str | None  # folder or hub name; None: the toy world's own
    data: str  # "toy", a name in tasks.data.TRAINING_SETS, or a file
    track: str  # whose defaults
    paper: bool
    size: str  # of the toy world's own model
    warm_start_batches: int
    config: CLIPOConfig
    command: str = ""  # that began the run
    engine: str = "fast"  # whose functions computed it
    world: dict = field(default_factory=dict)  # changes to tasks.toy.World
    checksums: dict = field(default_factory=dict)  # of the files of the start model and of a data file, when it began
    threads: int | None = None  # of torch, when it began: on other ones it adds in another order

    def __post_init__(self):
        check_types(self)
        if self.model == "":
            raise ValueError("model is empty; expected a folder or a name on the hub")
        for name, known in (("track", TRACKS), ("size", SIZES), ("engine", ENGINES)):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name} is {value!r}; expected one of: {', '.join(known)}")
        if self.warm_start_batches < 1:
            raise ValueError(f"warm_start_batches is {self.warm_start_batches}; expected 1 or more")
        World.changed(self.world)  # raises ValueError

    @property
    def on_toy(self) -> bool:
        return self.data == "toy"


def parser(about: str = "") -> argparse.ArgumentParser:
    """The command line of train.py. An option that is not given is absent from the result: --resume can tell."""
    p = OptionParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS
    )
    p.add_argument("--model", metavar="NAME_OR_FOLDER", help="causal LM on the hub or in a folder (default: the toy's)")
    p.add_argument(
        "--data", metavar="NAME_OR_FILE",
        help=f"toy, {', '.join(TRAINING_SETS)}, or a .parquet or .jsonl file (default: toy; gsm8k with --model)",
    )  # fmt: skip
    p.add_argument(
        "--track", choices=list(TRACKS), help="the defaults to take (default: those of --data if it is one, else gsm8k)"
    )
    p.add_argument("--paper", action="store_true", help="on the toy world: the paper's constants, not the informative")
    p.add_argument("--size", choices=list(SIZES), help="the toy world's model (default: tiny)")
    p.add_argument("--world", metavar="JSON", help="the toy world's dials that are changed: '{\"mistaught\": 0.2}'")
    p.add_argument(
        "--warm-start-batches", type=int, metavar="N",
        help="supervised batches before, on the toy world: 600 of 32 demonstrations, 100 of 8 for a --model",
    )  # fmt: skip
    p.add_argument(
        "--out", metavar="FOLDER",
        help="where the run is written (default: runs/NAME, by the options; with --both: the folder of both, runs)",
    )  # fmt: skip
    p.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    p.add_argument(
        "--engine", choices=ENGINES,
        help="plain: the functions of clipo.py; fast: their twins in engine/ (default: fast; plain for the toy's)",
    )  # fmt: skip
    p.add_argument("--save-every", type=int, metavar="N", help="steps between checkpoints (default: 20)")
    p.add_argument("--log-groups", type=int, metavar="N", help="groups of each step in rollouts.jsonl (default: 2)")
    p.add_argument(
        "--test-stories", type=int, metavar="N", help="of each level in the toy's table (default: 300; 0: no table)"
    )
    p.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out, with its settings")
    p.add_argument(
        "--both", action="store_true",
        help="GRPO and then CLIPO from the same start on the toy world, and a table of both (default without options)",
    )  # fmt: skip
    group = p.add_argument_group("hyperparameters (a value per track where tracks differ; in brackets the source)")
    add_options(group)
    return p


def settings_and_folder(given: dict) -> tuple[Settings, Path]:
    """What a new or resumed run computes, and where it is written. Raises UserError."""
    check_numbers(given, {"save_every": 1, "log_groups": 1, "warm_start_batches": 1, "test_stories": 0})
    for name in ("model", "data"):  # a run may be resumed from another folder
        if name in given and Path(given[name]).exists() and given[name] not in ("toy", *TRAINING_SETS):
            given[name] = str(Path(given[name]).resolve())
    if not given.get("resume"):
        settings = new_settings(given)
        out = Path(given.get("out", default_out(settings)))
        folder.refuse_used(out)
    elif "out" not in given:
        raise UserError("--resume is given without --out; expected --out with the folder of the run to go on with")
    else:
        out = Path(given["out"])
        settings = settings_of_run(given, out)
    folder.refuse_inside(out, settings.model)
    return settings, out


def new_settings(given: dict) -> Settings:
    """Settings from the options given and the defaults of their track. Raises UserError."""
    data = given.get("data", "gsm8k" if "model" in given else "toy")
    if data != "toy" and "model" not in given:
        raise UserError(f"--data is {data} but no --model is given; expected --model with a folder or a hub name")
    if data in BENCHMARKS and data not in TRAINING_SETS:
        raise UserError(f"--data is {data}, which is there to test with; expected one of: {', '.join(TRAINING_SETS)}")
    if data != "toy":
        check_source(data)
    track = given.get("track", data if data in TRACKS else "gsm8k")
    try:
        config = config_from(given, track, given.get("paper", False))
        variants.parts(config, torch.Generator)  # refuses a loss here, not after minutes of a warm start
        return Settings(
            given.get("model"),
            data,
            track,
            given.get("paper", False),
            given.get("size", "tiny"),
            given.get("warm_start_batches", 100 if "model" in given else 600),
            config,
            given["command"],
            given.get("engine", "fast" if "model" in given else "plain"),
            world_from(given.get("world", "{}")),
        )
    except ValueError as reason:
        raise UserError(str(reason)) from reason


def world_from(text: str) -> dict:
    """The dials of a --world. Raises ValueError."""
    try:
        world = from_json(text)
        World.changed(world)
    except ValueError as reason:
        raise ValueError(f"--world is {text}: {reason}") from reason
    return world


def settings_of_run(given: dict, out: Path) -> Settings:
    """What a run was begun with. Another --steps may be asked for; changes of what it computes are refused."""
    if (saved := folder.read_settings(out)) is None:
        raise UserError(f"{out} holds no run to resume (no settings.json); expected --out with the folder of a run")
    try:
        settings = Settings(**{**saved, "config": CLIPOConfig(**saved["config"])})
    except (ValueError, TypeError) as reason:
        raise UserError(
            f"{out / 'settings.json'} cannot be used ({reason}); expected what this version of train.py wrote"
        ) from reason
    before, free = {**saved, **saved["config"]}, ("steps", "command")
    if "world" in given:
        given = {**given, "world": world_from(given["world"])}
    changed = [name for name, value in given.items() if name in before and name not in free and before[name] != value]
    if changed:
        differences = ", ".join(f"--{n.replace('_', '-')} was {before[n]}, given {given[n]}" for n in changed)
        raise UserError(f"{out} was begun with other settings: {differences}; leave them out, or choose another --out")
    if given.get("steps", settings.config.steps) != settings.config.steps:
        try:
            settings.config = dataclasses.replace(settings.config, steps=given["steps"])
        except ValueError as reason:
            raise UserError(f"--{reason}") from reason
        settings.command += f" --steps {given['steps']}"
    return settings


def default_out(settings: Settings) -> Path:
    """runs/NAME. NAME has the subject and every setting that is not its track's default, but for how long a run is and
    what changes its speed alone. Over 60 characters it has a checksum instead.
    """
    config, loss = settings.config, settings.config.policy_loss
    usual = CLIPOConfig.for_track(settings.track, paper=settings.paper, policy_loss=loss)
    subject = "toy" if settings.model is None else f"{Path(settings.data).stem}-{Path(settings.model).name}"
    kind = "-grpo" if config.weight == 0 else "-paper" if settings.paper else ""
    changed = [f"-{name}-{json.dumps(value)}" for name, value in settings.world.items()]
    changed += [f"-{special}" for special in (settings.size, loss) if special not in ("tiny", "grpo")]
    if settings.on_toy and settings.warm_start_batches != (100 if settings.model else 600):
        changed.append(f"-warm{settings.warm_start_batches}")
    for f in dataclasses.fields(CLIPOConfig):
        value = getattr(config, f.name)
        left_out = f.name in ("steps", "seed", *ONLY_SPEED) or (f.name == "weight" and value == 0)
        if value != getattr(usual, f.name) and not left_out:
            changed.append(f"-{f.name}-{value}")
    words = "".join(changed).replace(" ", "").replace("/", "_").replace('"', "")
    if len(words) > 60:
        words = "-" + hashlib.sha256(words.encode()).hexdigest()[:8]
    seed = "" if config.seed == usual.seed else f"-seed{config.seed}"
    return Path("runs") / f"{subject}{kind}{words}{seed}"


def as_options(settings: dict) -> list[str]:
    """Settings as the command line has them.

    >>> as_options({"center_hidden": True, "head_mlp": False, "reward_floor": -0.9})
    ['--center-hidden', '--no-head-mlp', '--reward-floor=-0.9']
    """
    options = []
    for name, value in settings.items():
        option = name.replace("_", "-")
        options.append(
            f"--{option}" if value is True else f"--no-{option}" if value is False else f"--{option}={value}"
        )
    return options


def save_settings(settings: Settings, out: Path) -> None:
    folder.write_text(out / "settings.json", json.dumps(dataclasses.asdict(settings), indent=1))


# ----------------------------------------------------------------------------------------------------
# What a run reads from this disk stays as it was
# ----------------------------------------------------------------------------------------------------


def checksums_of(model: Path) -> dict[str, str]:
    """Of each file in a model's folder that opening it may read: weights, configuration, tokenizer."""
    kinds = (
        "*.safetensors", "*.bin", "*.index.json", "config.json", "generation_config.json", "tokenizer*", "*.jinja",
        "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    )  # fmt: skip
    files = {file for kind in kinds for file in model.glob(kind) if file.is_file()}
    of_a_run = ("head.safetensors", "optimizers.safetensors")
    return {file.name: folder.checksum(file) for file in sorted(files) if file.name not in of_a_run}


def checksums_now(settings: Settings) -> dict[str, str]:
    """Of the start's files, "model/config.json" and so on, and of a data file, "data"; {} for what is on the hub."""
    found = {}
    if settings.model and Path(settings.model).is_dir():
        found = {f"model/{name}": value for name, value in checksums_of(Path(settings.model)).items()}
    if Path(settings.data).suffix and Path(settings.data).is_file():
        found["data"] = folder.checksum(Path(settings.data))
    return found


def refuse_changed(settings: Settings) -> None:
    """Raise UserError if a run that goes on would find another start, its reference, or other data than it began with.

    A run of an older version knows no checksums.
    """
    before = settings.checksums
    now = checksums_now(settings) if before else {}
    if changed := [name for name in {**before, **now} if before.get(name) != now.get(name)]:
        place = settings.data if changed[0] == "data" else f"{settings.model}{changed[0].removeprefix('model')}"
        raise UserError(f"{place} has changed since the run began, or is gone; expected the file that it began with")
