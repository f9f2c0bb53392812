"""Arms: what is compared. Each table of lab.paper has its own; the same arm in two tables is one run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace

from config import INFORMATIVE, CLIPOConfig
from lab.runs import Run, all_settings
from tasks import toy


@dataclass(frozen=True)
class Arm:
    """What is changed of the toy track, the toy world and the trainer, and which arms it is compared with."""

    config: dict = field(default_factory=dict)
    against: str | None = "GRPO"
    world: dict = field(default_factory=dict)
    trainer: str = ""  # one of lab.referees.TRAINERS
    ceiling: str | None = "oracle"
    size: str = "tiny"
    doubled: int = 1  # as of Run
    batches: int | None = None  # of the warm start, where they are not the usual ones

    def run(self, seed: int, steps: int | None = None) -> Run:
        """With `steps` it is a short one that only tries the command: a short warm start, a short evaluation."""
        config = all_settings(self.config | ({"steps": steps} if steps else {}))
        world = asdict(toy.World.changed(self.world))
        own = {"batches": self.batches} if self.batches else {}
        short = {"batches": 10, "stories": 10} if steps else SHORTER.get(self.size, {}) | own
        doubled = 0 if self.size in SHORTER else self.doubled
        return Run("train", seed, config, world, trainer=self.trainer, doubled=doubled, size=self.size, **short)


PAPER = {f.name: f.default for f in fields(CLIPOConfig) if f.name in INFORMATIVE}  # the paper's constants
SHUFFLED = {"shuffle_contrast": True}
WITHOUT = {"weight": 0.0}
GRPO, CLIPO, ORACLE = Arm(WITHOUT, against=None), Arm(), Arm(WITHOUT, trainer="oracle")
ENDS = {"GRPO": GRPO, "oracle": ORACLE}  # between which an arm is measured

TRACK1 = {"GRPO": GRPO, "CLIPO": CLIPO, "CLIPO, shuffled": Arm(SHUFFLED), "oracle": ORACLE}
LONG = {name: replace(TRACK1[name], doubled=2) for name in ("GRPO", "CLIPO", "oracle")}
RIVALS = TRACK1 | {
    "same steps": Arm(trainer="same steps"),
    "GRPO, beta 0.5": Arm(WITHOUT | {"beta": 0.5}),
    "CLIPO, no KL": Arm({"beta": 0.0}),
}

BEFORE = {"friend_right": (0.99, 0.99, 0.99, 0.35, 0.15)}  # in whose world tables of one seed were made, and not again


def before(arms: dict[str, Arm]) -> dict[str, Arm]:
    """The same arms as they were there, and not on to twice the steps."""
    return {name: replace(arm, world=BEFORE | arm.world, doubled=0) for name, arm in arms.items()}


SHORTER = {  # warm start (in batches) and evaluation of models that take hours
    "small": {"batches": 300},
    "smollm": {"batches": 600, "stories": 200},  # of 8 demonstrations
}
AUTO = {"compute_dtype": "auto"}  # matrix products in bfloat16 where the CPU computes in it
SMALL = {  # a model of 27M parameters
    "GRPO": Arm(WITHOUT | AUTO, None, size="small"),
    "paper's constants": Arm(PAPER | AUTO, size="small"),
    "CLIPO": Arm(AUTO, size="small"),
    "oracle": Arm(WITHOUT | AUTO, trainer="oracle", size="small"),
}
GENTLE = {"lr": 1e-5, "max_new_tokens": 48, "head_warmup_steps": 8, **AUTO}  # docs/real-models.md says how chosen
SMOLLM = {  # a pretrained model of 135M
    "GRPO": Arm(WITHOUT | GENTLE, None, size="smollm"),
    "CLIPO": Arm(GENTLE, size="smollm"),
    "paper's constants": Arm(PAPER | GENTLE, size="smollm"),
    "CLIPO, shuffled": Arm(SHUFFLED | GENTLE, size="smollm"),
    "oracle": Arm(WITHOUT | GENTLE, trainer="oracle", size="smollm"),
}
BASELINES = {
    name + plus: Arm(config | weight, against)
    for name, config in {
        "GRPO": {},
        "DAPO": {"policy_loss": "dapo", "beta": 0.0, "resample_tries": 3, "overlong_buffer": 3},
        "GSPO": {"policy_loss": "gspo"},
        "GMPO": {"policy_loss": "gmpo"},
    }.items()
    for plus, weight, against in (("", WITHOUT, None), (" + CLIPO", {}, name))
} | {"oracle": ORACLE}
LOSSES = ENDS | {
    kind: Arm({"contrastive_kind": kind}) for kind in ("decoupled", "infonce", "supcon_out", "supcon_in", "soft_nn")
}
HEAD = ENDS | {
    "trained": CLIPO,
    "fixed": Arm({"head_steps": 0}),
    "MLP": Arm({"head_mlp": True}),
    "no warm-up": Arm({"head_warmup_steps": 0}),
    "warm-up of 12 steps": Arm({"head_warmup_steps": 12}),
}
TEMPERATURE = ENDS | {f"tau {t}": Arm({"tau": t}) for t in (0.02, 0.05, 0.1, 0.5)}
WEIGHT = ENDS | {f"lambda {weight}": Arm({"weight": weight}) for weight in (0.1, 0.3, 1.0, 2.0)}
PRECISION = ENDS | {"float32": CLIPO, "bfloat16": Arm({"compute_dtype": "bfloat16"})}
GROUP_SIZE = {
    f"{name}, G = {size}": Arm(
        config | {"samples_per_prompt": size, "prompts_per_step": 128 // size, "mini_batch_prompts": 128 // size},
        against,
    )
    for size in (4, 8, 16, 32)
    for name, config, against in (("GRPO", WITHOUT, None), ("CLIPO", {}, f"GRPO, G = {size}"))
} | {"oracle": replace(ORACLE, against="GRPO, G = 16")}
UNSCALED = {"scale_by_std": False}
SCOPE = (
    ENDS
    | {scope: Arm({"contrastive_scope": scope}) for scope in ("group", "wrong_of_all", "batch")}
    | {
        # Two ideas of ours: consensus over all questions by a head that the verdicts do not teach, and advantages that
        # do not blow up what little tells the rollouts of an all-right group apart.
        "batch, tau 0.2, fixed head": Arm({"contrastive_scope": "batch", "tau": 0.2, "head_steps": 0}),
        "GRPO, unscaled": Arm(UNSCALED | WITHOUT, None),
        "wrong_of_all, unscaled": Arm(UNSCALED, "GRPO, unscaled"),
    }
)

# From the paper's constants to ours, one change on top of the other.
CHANGES: dict[str, dict] = {
    "group mean off": {"center_hidden": True},
    "from chance": {"reward_from_chance": True},
    "floor -0.9": {"reward_floor": INFORMATIVE["reward_floor"]},
    "weight 1": {"weight": INFORMATIVE["weight"]},
    "all positives": {"contrastive_kind": "supcon_out"},
    "decoupled": {"contrastive_kind": "decoupled"},
    "tau 0.5": {"tau": INFORMATIVE["tau"]},
    "4 head steps": {"head_steps": INFORMATIVE["head_steps"]},
    "negatives from the batch": {"contrastive_scope": INFORMATIVE["contrastive_scope"]},
}
RUNGS = {"paper's constants": PAPER}
for change in CHANGES:
    RUNGS[f"+ {change}"] = list(RUNGS.values())[-1] | CHANGES[change]
LADDER = ENDS | {name: Arm(config) for name, config in RUNGS.items()}


def friend(rate: float) -> dict:
    """The world whose friend is right so often where we train (stories of up to 3 clauses)."""
    return {"friend_right": (rate,) * 3 + toy.WORLD.friend_right[3:]}


def in_world(world: dict, where: str) -> dict[str, Arm]:
    """GRPO, CLIPO and the oracle in another world, or for another time."""
    grpo, oracle = f"GRPO, {where}", f"oracle, {where}"
    return {
        grpo: Arm(WITHOUT, None, world),
        f"CLIPO, {where}": Arm({}, grpo, world, ceiling=oracle),
        oracle: Arm(WITHOUT, grpo, world, "oracle", ceiling=oracle),
    }


SOUND, FRIEND = (0.4, 0.6, 0.8), (0.80, 0.90, 0.99)  # the dials of the phase map
PHASE = {
    name: arm
    for sound in SOUND
    for rate in FRIEND
    for name, arm in in_world({"sound_demos": sound, **friend(rate)}, f"sound {sound}, friend {rate}").items()
}


# ----------------------------------------------------------------------------------------------------
# Choices, on tuning seeds
# ----------------------------------------------------------------------------------------------------

RATES = (0.8, 0.85, 0.9)


FRIENDS = {f"GRPO, friend {rate}": Arm(WITHOUT, None, friend(rate)) for rate in RATES}

THREE = PAPER | {"center_hidden": True, "reward_from_chance": True, "reward_floor": -0.9}
LONGER = {"head_warmup_steps": 10}
FORMS = ENDS | {
    "paper's constants": Arm(PAPER),
    "three changes": Arm(THREE),
    "three changes, head warm-up 10": Arm(THREE | LONGER),
    "three, but the group's mean left in": Arm(THREE | {"center_hidden": False}),
    "three, but not from chance": Arm(THREE | {"reward_from_chance": False}),
    "three, but floor -0.5": Arm(THREE | {"reward_floor": -0.5}),
    "nine changes": CLIPO,
    "nine changes, head warm-up 10": Arm(LONGER),
    "nine changes, but InfoNCE": Arm({"contrastive_kind": "infonce"}),
    "nine changes, but the paper's anchors": Arm(trainer="paper's anchors"),
}
TAKEN_AWAY = ENDS | {
    "nine changes": CLIPO,
    "but one head step": Arm({"head_steps": 1}),
    "but negatives from the group": Arm({"contrastive_scope": "group"}),
    "but InfoNCE": Arm({"contrastive_kind": "infonce"}),
    "but weight 0.2": Arm({"weight": 0.2}),
    "but tau 0.05": Arm({"tau": 0.05}),
    "but the group's mean left in": Arm({"center_hidden": False}),
    "but not from chance": Arm({"reward_from_chance": False}),
    "but floor -0.5": Arm({"reward_floor": -0.5}),
}
HELPS = {  # at which friend does each begin to drift?
    f"{name}, friend {rate}": Arm(
        config,
        None if name == "GRPO" else f"GRPO, friend {rate}",
        friend(rate),
        ceiling=None,
        doubled=int(rate == 0.9),  # the usual world: on to 120 steps, as in Track I
    )
    for rate in (0.6, 0.7, 0.8, 0.9)
    for name, config in {
        "GRPO": WITHOUT,
        "paper's constants": PAPER,
        "paper's, shuffled": PAPER | SHUFFLED,
        "three changes": THREE,
        "CLIPO": {},
    }.items()
}
ALONE = dict(world={"friend_right": (0.025,) * 5}, batches=300)  # right by chance, 1 in 41; a weaker start
NO_FRIEND = {  # the paper's own question: are more answers right?
    "GRPO": Arm(WITHOUT, None, **ALONE),
    "paper's constants": Arm(PAPER, **ALONE),
    "paper's, shuffled": Arm(PAPER | SHUFFLED, **ALONE),
    "CLIPO": Arm(**ALONE),
    "oracle": Arm(WITHOUT, trainer="oracle", **ALONE),
}
# A step in one of three forms, at random: equal steps are seldom equal texts. Sums go wrong more often then, so that of
# the right answers fewer are sound; with more sound demonstrations they are the majority again.
FORMS_OF_A_STEP = {"three forms": {"forms": (1, 1, 1)}, "more sound": {"forms": (1, 1, 1), "sound_demos": 0.85}}
SURFACES, SURFACES_SOUND = (
    {
        name: replace(arm, world=world)
        for name, arm in {"GRPO": GRPO, "CLIPO": CLIPO, "same steps": RIVALS["same steps"], "oracle": ORACLE}.items()
    }
    for world in FORMS_OF_A_STEP.values()
)
DIAL_FRIEND, DIAL_MISTAUGHT = (0.8, 0.9, 0.99), (0.0, 0.08, 0.2)  # where does patching pay?
DIAL = {
    f"friend {rate}, mis-taught {share}": Arm(against=None, world=friend(rate) | {"mistaught": share})
    for rate in DIAL_FRIEND
    for share in DIAL_MISTAUGHT
}
FROZEN = {"GRPO": WITHOUT, "paper's constants": PAPER, "three changes": THREE, "nine changes": {}}
PRETRAINED_FROZEN = {  # (the head learns in every step there: how many are warm-up decides nothing)
    arm: config | GENTLE | {"steps": 20, "head_warmup_steps": 12} for arm, config in FROZEN.items() if arm != "GRPO"
}
FORM_HEADS = {arm: FROZEN[arm] for arm in ("paper's constants", "nine changes")} | {
    "paper's constants, floor -0.9": PAPER | {"reward_floor": -0.9},
    "nine changes, 16 head steps": {"head_steps": 16},
    "nine changes, MLP head": {"head_mlp": True},
}
FROZEN_RATES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.99)
