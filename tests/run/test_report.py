"""A run's page: what is put into it, and what a reader sees and does, in a real browser."""

import itertools
import json
import shutil
from types import SimpleNamespace

import processes
import pytest
import torch
from conftest import PROMPTS, ROOT, make_model
from test_step import step

from border import UserError
from config import CLIPOConfig
from engine.guard import Trainer
from run import log as run_log
from run import page as run_page
from tasks.data import Problem

HOSTILE = "</script><img src=x onerror=\"window.hacked=1\"><!--<script>\u2028 & 'quoted' \U0001f600"


def group(step, texts, question="What is 2 + 3?", **more):
    """A row of rollouts.jsonl: all but the last are right, the second by wrong steps; rewards fall to the right."""
    n = len(texts)
    rollouts = [
        {
            "text": text, "correct": i < n - 1, "sound": i != 1, "bad_step": [0, 3] if i == 1 else None,
            "anchor": i < n - 1, "positives": [j for j in range(n - 1) if j != i] if i < n - 1 else [],
            "contrastive_loss": 0.5 + i, "contrastive_reward": 0.9 - i, "reward": 1.9 - i, "advantage": 1.0 - i,
        }
        for i, text in enumerate(texts)
    ]  # fmt: skip
    cosine = [[round(1 - abs(i - j) / n, 2) for j in range(n)] for i in range(n)]
    return {"step": step, "question": question, "answer": "5", "all_positives": True, "rollouts": rollouts,
            "cosine": cosine, **more}  # fmt: skip


def metrics(step):
    names = "accuracy process reward contrastive_reward contrastive_loss on_floor groups_without_contrast kl entropy"
    numbers = {name: 0.1 * step for name in names.split()}
    seconds = {"rollout": 1.0, "verify": 0.1, "contrast": 0.2, "update": 2.0}
    return {
        "step": step,
        **numbers,
        "policy_loss": None if step == 1 else 0.0,
        "response_length": 9.0,
        "seconds": seconds,
    }


def write_run(folder, groups, steps=3, **settings):
    folder.mkdir(parents=True)
    settings = {"model": "m", "data": "toy", "command": "python train.py", "config": {"steps": 9, **settings}}
    (folder / "settings.json").write_text(json.dumps(settings))
    for name, rows in (("metrics.jsonl", map(metrics, range(1, steps + 1))), ("rollouts.jsonl", groups)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def shown_data(file):
    """What a page carries."""
    text = file.read_text(encoding="utf-8")
    return json.loads(text.split('id="data">')[1].split("</script>")[0])


# ----------------------------------------------------------------------------------------------------
# What a run keeps for its page
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["infonce", "decoupled"])
def test_logged_groups_hold_cosines_and_positives_of_the_step(kind):
    from test_step import ANSWERS, TOKENIZER, even

    model = make_model_that_ends()
    config = CLIPOConfig(contrastive_kind=kind, head_warmup_steps=0, max_new_tokens=9, prompts_per_step=4, beta=0.0)
    trainer = Trainer(model, TOKENIZER, even, config)
    problems, one_drawn = [Problem("q", a) for a in ANSWERS], kind == "infonce"
    step(trainer, PROMPTS, problems)
    contrast, correct = trainer.last.agreement, trainer.last.correct
    knows_no_more = SimpleNamespace(remarks=lambda problem, text: {})
    rows = list(run_log.logged_groups(trainer.last, knows_no_more, 3, config))
    assert len(rows) == 3 and contrast.pairs.anchor.any()
    for g, row in enumerate(rows):
        z = contrast.embedding[g]
        torch.testing.assert_close(torch.tensor(row["cosine"]), z @ z.T, atol=0.006, rtol=0)
        for i, rollout in enumerate(row["rollouts"]):
            anchor = contrast.pairs.anchor[g, i]
            others = [j for j in range(len(z)) if j != i and correct[g, j]] if anchor else []
            if one_drawn and others:
                assert rollout["positives"] == contrast.pairs.target[g, i].nonzero()[:, 0].tolist()
                assert len(rollout["positives"]) == 1 and rollout["positives"][0] in others
            else:
                assert rollout["positives"] == others
        assert row["all_positives"] == (not one_drawn)


def make_model_that_ends():
    from conftest import CONFIGS

    model = make_model(CONFIGS["qwen2"])
    model.generation_config.eos_token_id = [1, 3, 17, 31]
    return model


# ----------------------------------------------------------------------------------------------------
# What goes into the page
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [HOSTILE, [HOSTILE, {HOSTILE: None}], "\ud800", "<", 1.5, True, []])
def test_json_in_a_page_says_the_same_and_cannot_end_its_element(value):
    assert "<" not in run_page.as_json(value) and run_page.as_json(value).isascii()
    assert json.loads(run_page.as_json(value)) == value


def test_numbers_that_are_none_become_null():
    assert run_page.as_json([float("nan"), float("inf"), 1 / 3]) == "[null,null,0.33333]"


def test_a_page_may_be_asked_to_be_small(tmp_path, capsys):
    out = write_run(tmp_path / "run", [group(step, "abcd") for step in range(1, 41)], steps=40)
    for kilobytes, steps in ((1000, 40), (10, None)):
        assert run_page.main([str(out), "--kilobytes", str(kilobytes)]) == 0
        (run,) = shown_data(out / "report.html")
        kept = [one["step"] for one in run["groups"]]
        assert len(json.dumps(run["groups"], separators=(",", ":"))) <= 1000 * kilobytes
        assert kept[0] == 1 and kept[-1] == 40 and (len(kept) == steps if steps else 2 <= len(kept) < 40)
    with pytest.raises(SystemExit) as stopped:
        run_page.main([str(out), "--kilobytes", "0"])
    assert stopped.value.code == 2 and "--kilobytes is 0; expected 1 or more" in capsys.readouterr().err


def test_a_long_run_stays_under_five_megabytes_with_its_first_and_last_step(tmp_path):
    groups = [group(step, ["x" * 9000] * 8) for step in range(1, 301)]
    run = write_run(tmp_path / "run", groups, steps=3000)
    file = run_page.write_page([run, run])
    assert 1e6 < file.stat().st_size < 5e6
    (one, _) = shown_data(file)
    kept = [g["step"] for g in one["groups"]]
    assert (
        kept[0] == 1
        and kept[-1] == 300
        and one["note"] == f"{300 - len(kept)} of 300 steps are left out here to keep the page small."
    )
    gaps = {b - a for a, b in itertools.pairwise(kept)}
    assert max(gaps) - min(gaps) <= 1
    assert len(one["metrics"]) == run_page.POINTS and one["metrics"][-1]["step"] == 3000
    text = one["groups"][0]["rollouts"][0]["text"]
    assert "[... 3,000 characters left out ...]" in text and len(text) < 6100


def test_a_run_in_progress_is_shown_up_to_its_last_whole_line(tmp_path):
    run = write_run(tmp_path / "run", [group(1, "ab"), group(2, "ab")])
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        with (run / name).open("a") as stream:
            stream.write('{"step": 4, "half')
    (one,) = shown_data(run_page.write_page([run]))
    assert one["done"] == 3 and [g["step"] for g in one["groups"]] == [1, 2]


def test_a_skipped_step_is_counted_and_has_no_point(open_page, tmp_path):
    run = write_run(tmp_path / "run", [group(1, "ab")], steps=2)
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps({"step": 3, "skipped": "update", "seconds": {"rollout": 1.0}}) + "\n")
    page = open_page(run_page.write_page([run]))
    assert "run: 3 of 9 steps, 1 skipped for a broken number." in page.locator("#about").inner_text()
    assert page.locator(".panel path").first.get_attribute("d").count("L") == 1  # two points, one line


def test_mistakes_get_one_line_and_status_2(tmp_path, capsys):
    empty = write_run(tmp_path / "empty", [], steps=0)
    broken = write_run(tmp_path / "broken", [])
    (broken / "metrics.jsonl").write_text("no json\n")
    for arguments, message in (
        (["nowhere"], "nowhere holds no run (no settings.json)"),
        ([empty], "has no finished step yet"),
        ([broken], "cannot be read"),
        (["a", "b", "c"], "3 runs are given; expected one or two"),
    ):
        assert run_page.main(list(map(str, arguments))) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1
    with pytest.raises(UserError):
        run_page.read_run(tmp_path)


# ----------------------------------------------------------------------------------------------------
# What a reader sees
# ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    groups = [
        group(step, [f"{step}.{g}.{i}" for i in "abcd"], f"Question {step}.{g}") for step in (1, 2, 3) for g in (0, 1)
    ]
    folder = write_run(tmp_path_factory.mktemp("report") / "toy", groups, weight=1.0)
    run_page.write_page([folder])
    return folder


def texts(page):
    return page.locator(".card .text").all_inner_texts()


def test_slider_and_choice_of_group_change_what_is_shown(open_page, run):
    page = open_page(run / "report.html")
    assert page.title() == "CLIPO: toy" and "toy: 3 of 9 steps" in page.locator("#about").inner_text()
    assert page.locator("#step-number").inner_text() == "3 of 9"
    assert texts(page) == ["3.0.a", "3.0.b", "3.0.c", "3.0.d"]
    page.locator("#step").fill("0")
    assert page.locator("#step-number").inner_text() == "1 of 9"
    assert texts(page)[0] == "1.0.a" and "Question 1.0" in page.locator("#question").inner_text()
    assert page.locator(".panel .now").first.inner_text() == "0.1"
    page.locator("#group").select_option("1")
    assert texts(page)[0] == "1.1.a" and "Expected answer: 5" in page.locator("#question").inner_text()
    page.locator("#step").fill("1")
    assert texts(page)[0] == "2.1.a"  # the group stays chosen


def test_a_card_carries_its_verdict_its_wrong_step_and_its_numbers(open_page, run):
    page = open_page(run / "report.html")
    words = page.locator(".verdict").all_inner_texts()
    assert words == ["● right, sound", "▲ right by wrong steps", "● right, sound", "✕ wrong"]
    assert page.locator("mark").all_inner_texts() == ["3.0"]  # characters 0 to 3 of the second
    values = page.locator(".card .values").all_inner_texts()
    assert values[0].split() == "r 1 L 0.5 rc +0.90 R 1.90 A +1.00".split()
    assert values[3].split() == "r 0 L – rc – R -1.10 A -2.00".split()


def test_cards_are_sorted_by_reward_and_so_are_the_rows_of_the_map(open_page, tmp_path):
    one = group(1, "abcd")
    for rollout, reward in zip(one["rollouts"], (0.1, 0.4, 0.3, 0.2), strict=True):
        rollout["reward"] = reward
    page = open_page(run_page.write_page([write_run(tmp_path / "run", [one])]))
    assert texts(page) == list("bcda")
    row = page.evaluate("[...document.getElementById('map').getContext('2d').getImageData(0, 0, 4, 1).data]")
    purple = [row[4 * j] for j in range(4)]  # the less red, the higher the cosine: b to b, c, d, a is 1, .75, .5, .75
    assert purple[0] < purple[1] == purple[3] < purple[2]


def framed(page):
    """The framed row of the map, and the columns framed in it."""
    cell = page.evaluate("document.getElementById('map').clientWidth / document.getElementById('map').width")
    left = page.evaluate("document.getElementById('map').offsetLeft")
    row = float(page.locator("#over rect.row").get_attribute("y")) / cell
    columns = [(float(r.get_attribute("x")) - left) / cell for r in page.locator("#over rect.positive").all()]
    return round(row), [int(c) for c in columns]


def test_pointing_at_a_card_lights_up_its_row_and_its_positives(open_page, run):
    page = open_page(run / "report.html")
    for i, positives in enumerate(([1, 2], [0, 2], [0, 1], [])):
        page.locator(".card").nth(i).hover()
        assert framed(page) == (i, positives)
        lit = page.locator(".card").evaluate_all("cards => cards.map(c => [...c.classList])")
        assert [j for j in range(4) if "active" in lit[j]] == [i]
        assert [j for j in range(4) if "positive" in lit[j]] == positives
    assert "no anchor" in page.locator("#reading").inner_text()
    page.locator(".card").nth(0).hover()
    assert page.locator(".card .cosine").all_inner_texts() == [
        "", "its positive, cosine 0.75", "its positive, cosine 0.50", "cosine 0.25"
    ]  # fmt: skip


def test_pointing_at_the_map_reads_a_cosine(open_page, run):
    page = open_page(run / "report.html")
    side = page.locator("#map").bounding_box()["width"]
    page.locator("#map").hover(position={"x": side * 0.9, "y": side * 0.3})
    assert page.locator("#reading").inner_text() == "Number 2 and number 4: cosine 0.50."
    assert framed(page)[0] == 1


def test_it_works_by_keyboard_alone(open_page, run):
    page = open_page(run / "report.html")
    page.keyboard.press("Tab")  # one run: the first control is the slider
    assert page.evaluate("document.activeElement.id") == "step"
    page.keyboard.press("ArrowLeft")
    assert page.locator("#step-number").inner_text() == "2 of 9"
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowDown")  # the group
    assert texts(page)[0] == "2.1.a"
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    assert framed(page)[0] == 2
    assert page.locator("[aria-selected=true]").count() == 1
    page.keyboard.press("End")
    page.keyboard.press("ArrowDown")  # there is none below
    assert framed(page)[0] == 3
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_a_click_on_a_curve_chooses_its_step(open_page, run):
    page = open_page(run / "report.html")
    box = page.locator(".panel svg").first.bounding_box()
    page.locator(".panel svg").first.click(position={"x": box["width"] * 0.15, "y": box["height"] / 2})
    assert page.locator("#step-number").inner_text() == "1 of 9"


def test_two_runs_are_overlaid_and_can_be_told_apart_without_colour(open_page, run, tmp_path):
    other = write_run(tmp_path / "toy-grpo", [group(2, "xyz")], weight=0.0)
    shutil.copytree(run, tmp_path / "toy")
    page = open_page(run_page.write_page([tmp_path / "toy", other]))
    paths = page.locator(".panel").first.locator("path")
    assert paths.count() == 2
    dashes = [paths.nth(i).get_attribute("stroke-dasharray") for i in range(2)]
    assert dashes[0] != dashes[1]
    page.locator("#run").select_option("1")
    assert texts(page) == ["x", "y", "z"]
    assert "weight (differs)" in page.locator("tr.differs").inner_text()


def test_hostile_text_stays_text(open_page, tmp_path):
    name = "<img src=x onerror=hacked=1>"
    folder = write_run(tmp_path / name, [group(1, [HOSTILE] * 3, HOSTILE, answer=HOSTILE)], note=HOSTILE)
    page = open_page(run_page.write_page([folder]))
    assert page.locator("img").count() == 0 and page.evaluate("window.hacked") is None
    assert page.locator(".card .text").first.evaluate("e => e.textContent") == HOSTILE
    assert HOSTILE in page.locator("#question").evaluate("e => e.textContent")
    assert page.title() == f"CLIPO: {name}"


def test_the_policy_stops_a_script_that_is_not_the_pages_own(browser, tmp_path):
    """Should text ever get through as markup: it would not run."""
    file = run_page.write_page([write_run(tmp_path / "run", [group(1, "abc")])])
    hostile = tmp_path / "hostile.html"
    hostile.write_text(
        file.read_text().replace("</main>", "</main><script>window.hacked=1</script><img src=x onerror=hacked=1>")
    )
    page = browser.new_page()
    page.goto(hostile.as_uri())
    assert page.locator(".card").count() == 3 and page.evaluate("window.hacked") is None
    page.close()


@pytest.mark.parametrize("width", [390, 1400])
def test_nothing_sticks_out_at_the_side(open_page, width, tmp_path):
    long = group(2, ["word " * 300, "x" * 3000, "b", "c"], "q" * 400)
    page = open_page(run_page.write_page([write_run(tmp_path / ("run" * 20), [group(1, "abcd"), long])]), width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for selector in (".card", "#map", ".panel", "#step", "#question"):
        box = page.locator(selector).first.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width
    cards, map_ = page.locator("#cards").bounding_box(), page.locator("#map").bounding_box()
    assert (map_["x"] > cards["x"] + cards["width"]) == (width == 1400)  # beside the cards, or above them


def test_every_text_has_contrast_enough(open_page, run):
    """WCAG 2.2, 1.4.3: 4.5 to 1 against what is behind it."""
    page = open_page(run / "report.html")
    pairs = page.evaluate("""() => [...document.querySelectorAll("main *")]
        .filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()) && e.getClientRects().length)
        .map(e => {
          const behind = x => getComputedStyle(x).backgroundColor, clear = "rgba(0, 0, 0, 0)";
          let under = e;
          while (under && behind(under) === clear) under = under.parentElement;
          const style = getComputedStyle(e), ink = e instanceof SVGElement ? style.fill : style.color;
          return [ink, under ? behind(under) : "rgb(255, 255, 255)", e.textContent];
        })""")
    assert len(pairs) > 50

    def luminance(css):
        channels = [int(c) / 255 for c in css[4:-1].split(",")]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    for text, behind, what in pairs:
        light, dark = sorted((luminance(text), luminance(behind)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (what, text, behind)


def test_it_opens_on_a_group_with_all_kinds_of_verdict_and_unequal_pay(open_page, tmp_path):
    """Not on the last step, whose answers are all right and paid alike; and not on one where nobody is an anchor."""
    dull, wrong, telling = group(3, "abcd"), group(2, "abcd"), [group(2, "efgh"), group(1, "ijkl")]
    for rollout in dull["rollouts"]:
        rollout |= {"correct": True, "sound": True, "anchor": True, "contrastive_reward": 1.0}
    for rollout in wrong["rollouts"]:
        rollout |= {"correct": False, "sound": False, "anchor": False, "contrastive_reward": 0.0}
    telling[1]["rollouts"][2]["contrastive_reward"] = 0.0  # paid less far apart
    page = open_page(run_page.write_page([write_run(tmp_path / "run", [telling[1], wrong, telling[0], dull])]))
    assert page.locator("#step-number").inner_text() == "2 of 9" and texts(page) == list("efgh")
    assert page.locator("#group").input_value() == "1"


def test_the_final_table_and_the_formulas_are_shown(open_page, tmp_path):
    ours = {"weight": 1.0, "reward_from_chance": True, "reward_floor": -0.9, "reward_ceiling": 1.0, "tau": 0.5}
    ours |= {"contrastive_kind": "decoupled", "contrastive_scope": "wrong_of_all", "center_hidden": True}
    clipo_, grpo = write_run(tmp_path / "toy", [], **ours), write_run(tmp_path / "grpo", [], **{**ours, "weight": 0.0})
    level = {"answer": [8, 10], "process": [0, 10], "lucky": [0, 0]}
    (clipo_ / "evaluation.json").write_text(json.dumps({"start": {"P0": level}, HOSTILE: {"P0": level}}))
    page = open_page(run_page.write_page([clipo_, grpo]))
    cells = page.locator("#levels td").all_inner_texts()
    assert cells[:4] == ["P0", "answer right", "80 [49, 94]", "80 [49, 94]"]  # eval.wilson's example
    assert cells[6] == "0 [0, 28]" and len(cells) == 8  # what was lucky is not shown
    assert page.locator("#levels th").last.evaluate("e => e.textContent") == HOSTILE
    formulas = page.locator("#formulas code").all_inner_texts()
    assert formulas[0].startswith("toy: rc = 1 (chance - L), between -0.9 and 1; L: decoupled, tau = 0.5")
    assert formulas[1] == "grpo: rc = 0 (plain GRPO)"


def test_shares_have_one_axis_and_missing_steps_interrupt_a_line(open_page, tmp_path):
    run = write_run(tmp_path / "run", [])
    rows = [
        metrics(step) | {"accuracy": 0.03 + 0.01 * step, "on_floor": None if step == 2 else 0.5} for step in (1, 2, 3)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = open_page(run_page.write_page([run]))
    panel = page.locator(".panel", has=page.get_by_role("heading", name="Right answers"))
    assert panel.locator("text").all_text_contents()[:2] == ["0", "1"]
    floor = page.locator(".panel", has=page.get_by_role("heading", name="On the reward's floor")).locator("path")
    assert floor.get_attribute("d").count("M") == 2 and "L" not in floor.get_attribute("d")


def test_a_table_that_is_none_is_refused(tmp_path):
    run = write_run(tmp_path / "run", [])
    for text in ("[]", '{"start": {"P0": {"answer": [1, 2, 3]}}}', '{"start": 3}', "{", "[" * 10000):
        (run / "evaluation.json").write_text(text)
        with pytest.raises(UserError, match=r"evaluation\.json"):
            run_page.read_run(run)


def test_a_run_without_kept_groups_says_so(open_page, tmp_path):
    page = open_page(run_page.write_page([write_run(tmp_path / "run", [])]))
    assert "No group of this run was kept" in page.locator("#missing").inner_text()
    assert not page.locator("#cards").is_visible() and page.locator(".panel").count() > 5


def test_the_page_of_a_real_run_opens(open_page, tmp_path):
    options = "--warm-start-batches 30 --prompts-per-step 2 --samples-per-prompt 4 --head-warmup-steps 1 --steps 3"
    done = processes.run(ROOT / "train.py", *options.split(), "--test-stories", "5", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    page = open_page(tmp_path / "run" / "report.html")
    assert page.locator(".card").count() == 4
    assert page.locator("#levels tr").count() == 1 + 4 * 2 + 1  # four levels, two shares; patched
    assert page.locator("#levels th").all_inner_texts() == ["level", "share", "start", "trained"]
    page.locator("#step").fill("2")
    page.locator("#group").select_option("0")
    kept = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    last = next(row for row in kept if row["step"] == 3)
    shown = page.locator(".card .text").evaluate_all("cards => cards.map(c => c.textContent)")
    by_reward = sorted(last["rollouts"], key=lambda rollout: -rollout["reward"])
    assert [s.replace("⟨a step is missing here⟩", "") for s in shown] == [rollout["text"] for rollout in by_reward]
    assert options in page.locator("#commands").inner_text()
