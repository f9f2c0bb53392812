"""The paper in miniature: its tables and figures re-drawn on the toy world, with seeds, intervals and controls.

    python -m lab.paper track1                    one table: run what is missing in results/runs.jsonl, then draw
    python -m lab.paper all                       everything; stop it at any time, the same command goes on
    python -m lab.paper all --draw                draw again from the runs that are there, train nothing
    python -m lab.paper track1 --seeds 1 --steps 3    does it work? Written to runs/trial, its numbers mean nothing

NAME is one of: {names}.

Every table compares arms seed by seed with the arm they are measured against: the same warm start, the same stories.
Intervals are 95% t-intervals of the mean paired difference over seeds. Shares are of {stories} stories, in percent.
The *oracle* is a ceiling, by cheating: it is rewarded if the whole response is sound, steps and all.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tsne
from border import OptionParser
from config import CLIPOConfig
from lab.arms import (
    BASELINES,
    CHOICE_OF_FRIEND,
    FROZEN,
    GROUP_SIZE,
    HEAD,
    LADDER,
    LIMITS,
    LOSSES,
    MECHANISM,
    PHASE,
    PRECISION,
    REFEREE,
    SCOPE,
    SMALL,
    SMOLLM,
    TEMPERATURE,
    TRACK1,
    WEIGHT,
    Arm,
)
from lab.figures import mechanism_figure, phase_figure, temperature_figure, track1_figure
from lab.provenance import ROOT, markdown
from lab.runs import PRETRAINED, Run, known_runs, make
from lab.tables import Lines, comparison, frozen_table, levels_table, provenance, track1_json, twice_table
from run import points


@dataclass(frozen=True)
class Experiment:
    title: str
    arms: dict[str, Arm]
    seeds: int = 4
    first: int = 32  # of its seeds
    figure: Callable[[Lines, Path], None] | None = None


FIRST = 16  # seeds below it were looked at while the world was made
EXPERIMENTS = {  # the most important first: `all` may be stopped
    "track1": Experiment("Track I in miniature", TRACK1, 16, 32, track1_figure),
    "referee": Experiment("What a referee would ask", REFEREE, 4),
    "mechanism": Experiment("What the contrastive reward pays for", MECHANISM, 4, 32, mechanism_figure),
    "limits": Experiment("Where does it not hold?", LIMITS, 2),
    "phase": Experiment("When does it help? The world's two dials", PHASE, 1, 32, phase_figure),
    "ladder": Experiment("From the paper's constants to ours, one change on top of the other", LADDER, 2),
    "baselines": Experiment("Policy losses, each with and without CLIPO", BASELINES, 1),
    "head": Experiment("The contrastive head", HEAD, 1),
    "scope": Experiment("Where positives and negatives come from", SCOPE, 1),
    "losses": Experiment("Contrastive losses", LOSSES, 1),
    "temperature": Experiment("Temperature tau", TEMPERATURE, 1, 32, temperature_figure),
    "weight": Experiment("Weight lambda", WEIGHT, 1),
    "groupsize": Experiment("Group size at equal rollouts per step", GROUP_SIZE, 1),
    "precision": Experiment("Matrix products in bfloat16, weights and optimiser in float32", PRECISION, 1),
    "small": Experiment("A model of 27M parameters", SMALL, 1),
    "smollm": Experiment(
        "A pretrained model: SmolLM2-135M-Instruct, on 100 stories", SMOLLM, 1, 32, partial(mechanism_figure, few=10)
    ),
}
EXPERIMENTS["friend"] = Experiment("Which friend?", CHOICE_OF_FRIEND, 8, 1000)
NAMES = [*EXPERIMENTS, "tsne", "all"]
APART = {"smollm"}  # not of `all`: it wants a model that is not made here
FROZEN_SEEDS = range(FIRST, FIRST + 2)


def frozen_run(seed: int) -> Run:
    return Run("frozen", seed, {arm: Arm(config).run(seed).config for arm, config in FROZEN.items()})


def seeds_of(experiment: Experiment, seeds: int | None) -> range:
    """Its own number of seeds, or another."""
    return range(experiment.first, experiment.first + (seeds or experiment.seeds))


def wanted(name: str, seeds: int | None, steps: int | None) -> list[Run]:
    """All runs of an experiment, seed by seed, so that a stopped command leaves whole seeds."""
    experiment = EXPERIMENTS[name]
    runs = [arm.run(seed, steps) for seed in seeds_of(experiment, seeds) for arm in experiment.arms.values()]
    return runs + [frozen_run(seed) for seed in FROZEN_SEEDS if name == "mechanism" and not steps]


def draw(name: str, out: Path, known: dict[str, dict], seeds: int | None, steps: int | None) -> bool:
    """The table of an experiment, and its figure, from the lines that are there. False if it has none of its own."""
    experiment = EXPERIMENTS[name]
    lines: Lines = {
        arm: [known[key] for seed in seeds_of(experiment, seeds) if (key := spec.run(seed, steps).key) in known]
        for arm, spec in experiment.arms.items()
    }
    used = {id(line): line for part in lines.values() for line in part}.values()
    if not used:
        return False
    expected, arms = len(seeds_of(experiment, seeds)), experiment.arms
    missing = [f"{arm} ({len(part)} of {expected} seeds)" for arm, part in lines.items() if len(part) < expected]
    starts = [{arm.run(seed, steps).start.key for arm in arms.values()} for seed in seeds_of(experiment, seeds)]
    if all(len(keys) == 1 for keys in starts):  # all arms of a seed begin with the same model
        arms = {"warm start": Arm(against=None), **arms}
        lines["warm start"] = [known[key] for (key,) in starts if key in known]
    parts = [f"# {experiment.title}", provenance(name, list(used)), comparison(arms, lines)]
    if missing:
        parts.append(f"Not complete yet: {', '.join(missing)}.")
    if experiment.figure and all(lines.values()):
        experiment.figure(lines, out / f"{name}.png")
    if name == "track1" and all(lines.values()):
        usual = CLIPOConfig.for_track("toy").steps
        parts += [f"After {usual} steps, and after twice as many:", twice_table(lines)]
        parts += [f"Means over seeds after {usual} / {2 * usual} steps:", levels_table(arms, lines)]
        (out / "track1.json").write_text(json.dumps(track1_json(lines), indent=1) + "\n", encoding="utf-8")
    if name == "mechanism" and (frozen := [known[r.key] for s in FROZEN_SEEDS if (r := frozen_run(s)).key in known]):
        parts += ["With frozen policies:", frozen_table(frozen)]
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


def tabulate_tsne(out: Path) -> None:
    """The numbers that go with each panel."""
    found = points.load_points(out / "tsne.npz")
    seed = CLIPOConfig.for_track("toy").seed
    about = f"`python -m lab.paper tsne`; seed {seed}; silhouette and purity as tsne.py defines them."
    table = markdown(points.scores(found))
    (out / "tsne.md").write_text(f"# t-SNE: what its panels are worth\n\n{about}\n\n{table}\n", encoding="utf-8")


def make_and_draw(name: str, out: Path, given: argparse.Namespace) -> bool:
    """One experiment, as the command line asks for it. False if there is nothing to draw."""
    file, runs = out / "runs.jsonl", ROOT / "runs" / "paper"
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
    if not given.draw:
        make(wanted(name, given.seeds, given.steps), file, runs, given.workers, given.device)
    return draw(name, out, known_runs(file), given.seeds, given.steps)


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
    parser.add_argument("--workers", type=int, default=os.cpu_count(), metavar="N", help="runs at a time (all cores)")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda: all workers share that GPU")
    given = parser.parse_args(arguments)
    for option in ("seeds", "steps", "workers"):
        if (value := getattr(given, option)) is not None and value < 1:
            parser.error(f"--{option} is {value}; expected 1 or more")
    if given.name == "smollm" and not given.draw and not PRETRAINED["smollm"].is_dir():
        parser.error(f"{PRETRAINED['smollm']} is missing; expected a model there: python -m lab.smollm runs/smollm")
    everything = [name for name in NAMES[:-1] if name not in APART or given.draw]
    names = everything if given.name == "all" else [given.name]
    out = given.out or (ROOT / "runs" / "trial" if given.seeds or given.steps else ROOT / "results")
    out.mkdir(parents=True, exist_ok=True)
    try:
        for name in names:
            print(out / f"{name}.md" if make_and_draw(name, out, given) else f"{name}: not run yet")
    except KeyboardInterrupt:
        print("stopped; what is finished stays, and the same command goes on", file=sys.stderr)
        return 130
    except RuntimeError as reason:
        print(f"error: {reason}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
