"""The paper in miniature: its tables and figures re-drawn on the toy world, with seeds, intervals and controls.

    python -m lab.paper track1                    one table: run what is missing in results/runs.jsonl, then draw
    python -m lab.paper all                       everything; stop it at any time, the same command goes on
    python -m lab.paper all --draw                draw again from the runs that are there, train nothing
    python -m lab.paper smollm --device cuda --workers 4 --minutes 12    in a quarter of an hour on a GPU: what fits
    python -m lab.paper track1 --seeds 1 --steps 3    does it work? Written to runs/trial, its numbers mean nothing

NAME is one of: {names}.

Every table compares arms seed by seed with the arm they are measured against: the same warm start, the same stories.
Intervals are 95% t-intervals of the mean paired difference over seeds. Shares are of {stories} stories, in percent.
The *oracle* is a ceiling, by cheating: it is rewarded if the whole response is sound, steps and all.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import tsne
from border import OptionParser
from lab import arms as of
from lab.arms import Arm
from lab.figures import dial_figure, phase_figure, push_figure, temperature_figure, track1_figure
from lab.provenance import ROOT, markdown
from lab.runs import PRETRAINED, Run, all_settings, known_runs, make
from lab.tables import (
    Lines,
    by_step,
    compared,
    counted_and_compared,
    each_in_its_world,
    frozen_tables,
    provenance,
    track1_json,
    track1_tables,
)
from run import points
from tasks.toy import World


@dataclass(frozen=True)
class Experiment:
    title: str
    arms: dict[str, Arm]
    seeds: int = 4
    first: int = 32
    figure: Callable[[Lines, Path], None] | None = None
    tables: Callable[[dict[str, Arm], Lines], list[str]] = compared
    note: str = ""


TUNING, FRESH, OLD = 1000, 32, 16  # first seeds: to choose on; run once; reported of the world before
HARDEST = 1002  # of the tuning seeds: on which three changes fail
RULE = "What failed on a tuning seed was tried no further, by the rule in docs/worlds.md."
EXPERIMENTS = {  # the most important first: `all` may be stopped
    "track1": Experiment("Track I in miniature", of.TRACK1, 16, FRESH, track1_figure, track1_tables),
    "long": Experiment("Four times as many steps", of.LONG, tables=counted_and_compared),
    "surfaces": Experiment(
        "Steps in three forms: is learnt agreement worth more than equal texts?",
        of.SURFACES,
        tables=counted_and_compared,
    ),
    "surfaces-sound": Experiment(
        "The same, with more sound demonstrations", of.SURFACES_SOUND, tables=counted_and_compared
    ),
    "dial": Experiment(
        "Where does CLIPO fail? By friend and by mis-taught sums", of.DIAL, 4, FRESH, dial_figure, each_in_its_world
    ),
    "alone": Experiment(
        "Without a useful friend: are more answers right?", of.NO_FRIEND, 8, tables=counted_and_compared
    ),
    "rivals": Experiment("Beside others that hold", of.RIVALS, 16, tables=counted_and_compared),
    "friend": Experiment(
        "Which friend? The least reliable one with whom GRPO drifts", of.FRIENDS, 8, TUNING, note=RULE
    ),
    "form": Experiment("Which form? The fewest changes that hold", of.FORMS, 8, TUNING, note=RULE),
    "taken": Experiment("Which of the nine changes matter? The hardest tuning seed", of.TAKEN_AWAY, 1, HARDEST),
    "helps": Experiment("When do the paper's constants help? By friend", of.HELPS, 6, tables=each_in_its_world),
    "phase": Experiment("When does it help? The world's two dials", of.before(of.PHASE), 1, OLD, phase_figure),
    "ladder": Experiment("From the paper's constants to nine changes", of.before(of.LADDER), 2, OLD),
    "baselines": Experiment("Policy losses, each with and without CLIPO", of.before(of.BASELINES), 1, OLD),
    "head": Experiment("The contrastive head", of.before(of.HEAD), 1, OLD),
    "scope": Experiment("Where positives and negatives come from", of.before(of.SCOPE), 1, OLD),
    "losses": Experiment("Contrastive losses", of.before(of.LOSSES), 1, OLD),
    "temperature": Experiment("Temperature tau", of.before(of.TEMPERATURE), 1, OLD, temperature_figure),
    "weight": Experiment("Weight lambda", of.before(of.WEIGHT), 1, OLD),
    "groupsize": Experiment("Group size at equal rollouts per step", of.before(of.GROUP_SIZE), 1, OLD),
    "precision": Experiment("Matrix products in bfloat16", of.before(of.PRECISION), 1, OLD),
    "small": Experiment("A model of 27M parameters", of.before(of.SMALL), 1, OLD),
    "smollm": Experiment("A pretrained model: SmolLM2-135M-Instruct, on 200 stories", of.SMOLLM, 4, 20),
}
NAMES = [*EXPERIMENTS, "smollm-frozen", "frozen", "surfaces-frozen", "push", "tsne", "all"]
APART = {"smollm", "smollm-frozen"}  # not of `all`: it wants a model that is not made here
FROZEN_SEEDS = range(TUNING, TUNING + 2)


def frozen_runs() -> list[Run]:
    """All heads on the same rollouts of a policy that stays as it is, for each friend."""
    heads = {arm: all_settings(config) for arm, config in of.FROZEN.items()}
    worlds = [asdict(World.changed(of.friend(rate))) for rate in of.FROZEN_RATES]
    return [Run("frozen", seed, heads, world) for seed in FROZEN_SEEDS for world in worlds]


def pretrained_frozen() -> Run:
    """The same for a pretrained policy after a short start, in one world."""
    heads = {arm: all_settings(config) for arm, config in of.PRETRAINED_FROZEN.items()}
    return Run("frozen", TUNING, heads, asdict(World()), size="smollm", batches=100, stories=200)


def forms_frozen() -> dict[str, Run]:
    """Heads on a policy that writes a step in one form, and on two that write it in three."""
    heads = {arm: all_settings(config) for arm, config in of.FORM_HEADS.items()}
    worlds = {"one form": {}, **of.FORMS_OF_A_STEP}
    return {name: Run("frozen", TUNING, heads, asdict(World.changed(world))) for name, world in worlds.items()}


STEP_BY_STEP = {  # frozen policies whose heads are watched as they learn: title, and a title for each run
    "smollm-frozen": ("A pretrained policy, frozen: SmolLM2-135M-Instruct", {"": pretrained_frozen()}),
    "surfaces-frozen": ("Frozen policies whose steps have one form, or three", forms_frozen()),
}


def seeds_of(experiment: Experiment, seeds: int | None) -> range:
    """Its own number of seeds, or another."""
    return range(experiment.first, experiment.first + (seeds or experiment.seeds))


def wanted(name: str, seeds: int | None, steps: int | None) -> list[Run]:
    """All runs of an experiment, seed by seed, so that a stopped command leaves whole seeds."""
    experiment = EXPERIMENTS[name]
    return [arm.run(seed, steps) for seed in seeds_of(experiment, seeds) for arm in experiment.arms.values()]


def arms_and_lines(
    experiment: Experiment, known: dict[str, dict], seeds: int | None, steps: int | None
) -> tuple[dict[str, Arm], Lines]:
    """What was run of each arm, and of what it begins with: a "warm start" that all share, or each its "start, ARM"."""
    arms = experiment.arms
    runs = {arm: [spec.run(seed, steps) for seed in seeds_of(experiment, seeds)] for arm, spec in arms.items()}
    starts = {f"start, {arm}": [run.start for run in part] for arm, part in runs.items()}
    first, *rest = starts.values()
    if all(part == first for part in rest):
        arms, starts = {"warm start": Arm(against=None), **arms}, {"warm start": first}
    return arms, {arm: [known[run.key] for run in part if run.key in known] for arm, part in (runs | starts).items()}


def draw(name: str, out: Path, known: dict[str, dict], seeds: int | None, steps: int | None) -> bool:
    """The table of an experiment, and its figure, from the lines that are there. False if there are none."""
    experiment = EXPERIMENTS[name]
    arms, lines = arms_and_lines(experiment, known, seeds, steps)
    used = {id(line): line for arm in experiment.arms for line in lines[arm]}
    others = arms_and_lines(EXPERIMENTS["track1"], known, seeds, steps)[1] if name != "track1" else {}
    if not used.keys() - {id(line) for part in others.values() for line in part}:  # none of its own
        return False
    expected = len(seeds_of(experiment, seeds))
    missing = [f"{arm} ({n} of {expected} seeds)" for arm in experiment.arms if (n := len(lines[arm])) < expected]
    parts = [f"# {experiment.title}", provenance(name, list(used.values()))]
    if experiment.first == OLD:
        parts.append("Made in the third world (docs/worlds.md), in the present form, with the code of then.")
    if missing:
        parts.append(f"Not complete yet: {', '.join(missing)}. {experiment.note}".strip())
    parts += experiment.tables(arms, lines)
    if not missing and experiment.figure:
        experiment.figure(lines, out / f"{name}.png")
    if not missing and name == "track1":
        (out / "track1.json").write_text(json.dumps(track1_json(lines), indent=1) + "\n", encoding="utf-8")
    (out / f"{name}.md").write_text("\n\n".join(filter(None, parts)) + "\n", encoding="utf-8")
    return True


def draw_push(out: Path, known: dict[str, dict]) -> bool:
    """One figure of all runs that have measured their push and "P0, friend wrong": every run of every table a dot."""
    named = {**of.TRACK1, "paper's constants": of.FORMS["paper's constants"]}
    settings = {name: (arm.run(0).config, arm.trainer) for name, arm in named.items()}
    lines: dict[tuple[str, bool], dict[str, dict]] = {}  # (arm, in the usual world?) -> its lines by their keys
    for experiment in EXPERIMENTS.values():
        for run in [spec.run(seed) for seed in seeds_of(experiment, None) for spec in experiment.arms.values()]:
            line = known.get(run.key, {"greedy": {}})
            if "liar" in line["greedy"] and "push_sound" in line["history"]:
                kind = next((name for name in named if settings[name] == (run.config, run.trainer)), "others")
                usual = run.start == of.GRPO.run(run.seed).start
                lines.setdefault((kind, usual), {})[replace(run, doubled=0).key] = line  # each start once
    if lines:
        push_figure({kind: list(part.values()) for kind, part in lines.items()}, out / "push.png")
    return bool(lines)


def draw_frozen(out: Path, known: dict[str, dict]) -> bool:
    """What each setting pays while the policy stays as the start left it, by how often the friend is right."""
    lines = [known[run.key] for run in frozen_runs() if run.key in known]
    if not lines:
        return False
    parts = ["# With frozen policies", provenance("frozen", lines), *frozen_tables(lines)]
    (out / "frozen.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return True


def draw_step_by_step(name: str, out: Path, known: dict[str, dict]) -> bool:
    """What each head is paid, step by step, while the policy stays as its start left it."""
    title, runs = STEP_BY_STEP[name]
    lines = {part: known[run.key] for part, run in runs.items() if run.key in known}
    if not lines:
        return False
    parts = [f"# {title}", provenance(name, list(lines.values()))]
    for part, line in lines.items():
        right, copied = line["right"], line["copied"]
        what = (
            f"Of the responses {100 * copied:.0f}% copy. Right: {100 * right['calculated']:.0f}% of those that "
            f"calculate, {100 * right['copied']:.0f}% of those that copy."
        )
        parts += [f"## {part.capitalize()}"] * bool(part) + [what, *by_step(line)]
    (out / f"{name}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return True


def make_tsne(out: Path, runs: Path) -> None:
    """Train GRPO and CLIPO with train.py, as a reader would; embed and draw rollouts of both."""
    for name, options in (("GRPO", ["--weight", "0"]), ("CLIPO", [])):
        if not (runs / name / "head.safetensors").exists():
            shutil.rmtree(runs / name, ignore_errors=True)
            command = ["train.py", *options, "--out", str(runs / name), "--device", "cpu"]
            if subprocess.run([sys.executable, *command], cwd=ROOT).returncode:
                raise RuntimeError(f"{shlex.join(command)} did not end well; what it said stands above")
    embed_and_draw(str(runs / "GRPO"), str(runs / "CLIPO"), "--out", str(out), "--device", "cpu")


def embed_and_draw(*arguments: str) -> None:
    """tsne.py, as a reader would call it. Raises RuntimeError if it fails, which it has then told."""
    if tsne.main(arguments):
        raise RuntimeError(f"{shlex.join(['tsne.py', *arguments])} did not end well; what it said stands above")


TSNE = "seed 32"  # what the committed points were made of


def tabulate_tsne(out: Path) -> None:
    """The numbers that go with each panel."""
    found = points.load_points(out / "tsne.npz")
    about = f"`python -m lab.paper tsne`; {TSNE}; silhouette and purity as tsne.py defines them."
    table = markdown(points.scores(found))
    (out / "tsne.md").write_text(f"# t-SNE: what its panels are worth\n\n{about}\n\n{table}\n", encoding="utf-8")


def make_and_draw(name: str, out: Path, known: dict[str, dict], given: argparse.Namespace) -> bool:
    """One experiment, as the command line asks for it; `known` gains its runs. False if there is nothing to draw."""
    file, runs = out / "runs.jsonl", ROOT / "runs" / "paper"

    def run(wanted: list[Run]) -> None:
        if not given.draw:
            make(wanted, file, runs, given.workers, given.device, given.until)
            known.update(known_runs(file))

    if name == "tsne":
        points = out / "tsne.npz"
        if not given.draw:
            make_tsne(out, runs)
        elif points.exists():
            embed_and_draw("--redraw", str(points))
        else:
            return False
        tabulate_tsne(out)
        return True
    if name == "push":
        return draw_push(out, known)
    if name in STEP_BY_STEP:
        run(list(STEP_BY_STEP[name][1].values()))
        return draw_step_by_step(name, out, known)
    if name == "frozen":
        run(frozen_runs())
        return draw_frozen(out, known)
    run(wanted(name, given.seeds, given.steps))
    return draw(name, out, known, given.seeds, given.steps)


def main(arguments: Sequence[str] | None = None) -> int:
    about = __doc__.format(names=", ".join(NAMES), stories=Run.stories)
    parser = OptionParser(
        prog="python -m lab.paper", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", metavar="NAME", choices=NAMES, help="what to run and draw")
    parser.add_argument("--draw", action="store_true", help="only draw, from the runs that are there")
    parser.add_argument("--seeds", type=int, metavar="N", help="fewer or more seeds")
    parser.add_argument("--steps", type=int, metavar="N", help="shorter runs, to try the command")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="default: results; runs/trial with --seeds or --steps"
    )
    parser.add_argument("--minutes", type=float, metavar="M", help="begin no run that would not end in so many")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), metavar="N", help="runs at a time (all cores)")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda: all workers share that GPU")
    given = parser.parse_args(arguments)
    for option in ("seeds", "steps", "workers"):
        if (value := getattr(given, option)) is not None and value < 1:
            parser.error(f"--{option} is {value}; expected 1 or more")
    if given.minutes is not None and not 0 < given.minutes < math.inf:
        parser.error(f"--minutes is {given.minutes}; expected a number above 0")
    if given.name in APART and not given.draw and not PRETRAINED["smollm"].is_dir():
        parser.error(f"{PRETRAINED['smollm']} is missing; expected a model there: python -m lab.smollm runs/smollm")
    everything = [name for name in NAMES[:-1] if name not in APART or given.draw]
    names = everything if given.name == "all" else [given.name]
    out = given.out or (ROOT / "runs" / "trial" if given.seeds or given.steps else ROOT / "results")
    out.mkdir(parents=True, exist_ok=True)
    if given.name == "smollm" and not given.draw and given.device == "cpu":
        print("On a CPU this takes some twelve core hours a seed; on a large GPU an arm was done in a minute or two.")
    given.until = time.time() + 60 * (given.minutes or math.inf)
    known = known_runs(out / "runs.jsonl")
    try:
        for name in names:
            file = "push.png" if name == "push" else f"{name}.md"
            print(out / file if make_and_draw(name, out, known, given) else f"{name}: not run yet")
    except KeyboardInterrupt:
        print("stopped; what is finished stays, and the same command goes on", file=sys.stderr)
        return 130
    except RuntimeError as reason:
        print(f"error: {reason}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
