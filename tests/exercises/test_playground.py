"""The playground: its numbers are the Python functions', and what a reader sees and does, in a real browser."""

import builtins
import dataclasses
import math
import random
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import config
import variants
from clipo import HeadTrainer, group_advantages
from config import CLIPOConfig
from exercises import picture

PAGE = ROOT / "exercises" / "playground.html"
KINDS, SCOPES = config.CONTRASTIVE_LOSSES, config.SCOPES
CONSTANTS = [*config.INFORMATIVE.keys() - {"head_steps"}]


@pytest.fixture
def page(open_page):
    return open_page(PAGE)


def preset(page, number):
    page.locator("#presets button").nth(number - 1).click()


def point(page, number):
    return page.locator("[role=slider]").nth(number - 1)


def wait_for(page, condition):
    """playwright's own way evaluates strings in the page, which the page's policy forbids."""
    for _ in range(200):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    pytest.fail(f"never became true: {condition}")


def table(page):
    """The rows of rollouts: their cells as texts, the minus sign as Python writes it."""
    rows = page.locator("#bars tbody tr:visible").all()
    return [[text.replace("\u2212", "-") for text in row.locator("th, td").all_inner_texts()] for row in rows]


def column(page, name):
    """A column of that table as numbers; nan for a dash."""
    place = ["rollout", "j", "L", "rc", "R", "A", "slope"].index(name)
    texts = [re.sub("[▼▲]", "", row[place]) for row in table(page)]
    return [math.nan if text == "–" else float(text) for text in texts]


# ----------------------------------------------------------------------------------------------------
# The numbers
# ----------------------------------------------------------------------------------------------------


def in_python(angles, right, settings, target):
    """The same numbers by clipo.py and variants.py in float64, with the positives that the page drew."""
    G = settings["G"]
    chosen = {name: settings[name] for name in CONSTANTS}
    given = CLIPOConfig(samples_per_prompt=G, d_embed=2, head_steps=0, **chosen)
    parts = variants.parts(given, random=None)
    correct = torch.tensor(right).view(-1, G)
    pairs = parts.pairs(correct, None)._replace(target=torch.tensor(target).view(len(correct), G, -1))
    parts = dataclasses.replace(parts, pairs=lambda correct, random: pairs)
    half = HeadTrainer(2, torch.device("cpu"), given, parts)
    half.head.double().layers[0].weight.data = torch.eye(2, dtype=torch.float64)  # z = normalise(h)
    angle = torch.tensor(angles, dtype=torch.float64).deg2rad().view(-1, G).requires_grad_()
    h = torch.stack([angle.cos(), angle.sin()], -1)  # (P, G, 2)
    found = half.contrastive_step(h, correct)
    z, rc, anchor = found.embedding.flatten(0, 1), found.reward, pairs.anchor
    if anchor.any():  # the slope by autograd: `contrast` keeps no gradient for h
        centred = h - h.mean(1, keepdim=True) if given.center_hidden else h
        parts.loss(half.head(centred), pairs, given.tau)[anchor].mean().backward()
    reward = correct + rc
    chance = variants.chance_level(given.contrastive_kind, pairs)
    rows = {
        "L": found.loss, "rc": rc, "R": reward, "A": group_advantages(reward), "chance": chance.where(anchor, 0.0),
        "on_floor": (rc <= given.reward_floor) & anchor, "on_ceiling": (rc >= given.reward_ceiling) & anchor,
        "gradient": torch.zeros_like(angle) if angle.grad is None else angle.grad,
    }  # fmt: skip
    flat = {name: values.flatten() for name, values in rows.items()}
    return {**flat, "z": z, "cosine": z @ z.T, "mean_loss": found.loss.sum() / anchor.sum().clamp(min=1)}, pairs


def any_settings(draw, kind, scope):
    right = [draw.random() < draw.choice([0.3, 0.7]) for _ in range(16)]
    return {
        "angles": [draw.uniform(0, 360) for _ in range(16)], "right": draw.choice([right, right, right, [True] * 16]),
        "G": draw.randint(8, 16), "seed": draw.randint(0, 999), "contrastive_kind": kind, "contrastive_scope": scope,
        "tau": draw.choice([0.02, 0.05, 0.3, 0.5, 1.0]), "weight": draw.choice([0.0, 0.2, 1.0, 2.0]),
        "reward_floor": draw.choice([0.0, -0.5, -0.9]), "reward_ceiling": draw.choice([0.0, 0.3, 1.0]),
        "reward_from_chance": draw.random() < 0.5, "center_hidden": draw.random() < 0.5,
    }  # fmt: skip


SHOW = "chosen => { Object.assign(state, chosen); update(); return numbers(state); }"  # as a reader would set it
OTHER = "([name, G]) => OTHER[name].slice(0, G)"


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_is_that_of_the_python_functions(page, kind):
    draw, flags = random.Random(kind), {"on_floor": 0, "on_ceiling": 0, "anchor": 0}
    for scope in SCOPES * 2:
        chosen = any_settings(draw, kind, scope)
        found, G = page.evaluate(SHOW, chosen), chosen["G"]
        angles, right = chosen["angles"][:G], chosen["right"][:G]
        if scope != "group":
            angles += page.evaluate(OTHER, ["angles", G])
            right += page.evaluate(OTHER, ["right", G])
        expected, pairs = in_python(angles, right, chosen, found["pairs"]["target"])
        for name, values in expected.items():
            shape = torch.tensor(found[name], dtype=torch.float64)
            torch.testing.assert_close(shape, values.detach().double(), atol=1e-5, rtol=1e-7, msg=f"{name}, {chosen}")
        for name in ("positive", "negative"):
            assert torch.equal(torch.tensor(found["pairs"][name]), getattr(pairs, name).flatten(0, 1))
        assert found["pairs"]["anchor"] == pairs.anchor.flatten().tolist()
        drawn = pairs.target & pairs.positive
        assert torch.equal(drawn.sum(-1), pairs.positive.any(-1).long()) and torch.equal(drawn, pairs.target)
        for name in flags:
            flags[name] += sum(found["pairs"][name] if name == "anchor" else found[name])
        check_shown(page, {name: values.detach() for name, values in expected.items()}, pairs.anchor[0], chosen)
    assert all(flags.values()), flags  # each of them was seen


def check_shown(page, expected, anchor, chosen):
    """What stands on the page is rounded from the Python functions' numbers."""
    rows, G = table(page), chosen["G"]
    names = [f"{'●' if right else '◇'} {i + 1}" for i, right in enumerate(chosen["right"][:G])]
    assert [row[0] for row in rows] == names
    for i, (_, j, *numbers) in enumerate(rows):
        flags = ("▼" if expected["on_floor"][i] else "") + ("▲" if expected["on_ceiling"][i] else "")
        assert re.sub("[^▼▲]", "", numbers[1]) == flags
        assert bool(j) == bool(anchor[i] and chosen["contrastive_kind"] == "infonce")
        for text, name in zip(numbers, ("L", "rc", "R", "A", "gradient"), strict=True):
            if name in ("L", "rc") and not anchor[i]:
                assert text == "–"
            else:
                assert abs(float(text.strip("▼▲")) - expected[name][i].item()) < 0.00051, (name, text)
    cells = page.locator("#cosines td:visible").all_inner_texts()[1:]
    cosines = torch.tensor([float(text.replace("\u2212", "-")) for text in cells]).view(G, G)
    torch.testing.assert_close(cosines, 100 * expected["cosine"][:G, :G].float(), atol=0.5001, rtol=0)
    said = page.locator("#summary").inner_text().replace("\u2212", "-")
    if anchor.any():
        n, L, chance, least, most, floor, ceiling = re.fullmatch(
            r"Anchors: (\d+).*\. Mean L (\S+), chance (\S+)\. "
            r"rc from (\S+) to (\S+); on the floor (\d+), on the ceiling (\d+)\.",
            said,
        ).groups()
        rc = expected["rc"][:G][anchor]
        wanted = [anchor.sum(), expected["mean_loss"], expected["chance"][:G].max(), rc.min(), rc.max(),
                  expected["on_floor"][:G].sum(), expected["on_ceiling"][:G].sum()]  # fmt: skip
        for text, value in zip((n, L, chance, least, most, floor, ceiling), wanted, strict=True):
            assert abs(float(text) - value.item()) < 0.00051, said
    else:
        assert said.startswith("No anchor here")


def test_its_constants_are_the_papers_and_ours(page):
    paper, ours = (page.evaluate(f"playground.{name}") for name in ("PAPER", "OURS"))
    assert ours == {name: config.INFORMATIVE[name] for name in CONSTANTS}
    assert paper == {name: getattr(CLIPOConfig(), name) for name in CONSTANTS}


def test_every_positive_is_drawn_as_often_and_the_same_seed_draws_the_same(page):
    def draws():
        return page.evaluate(
            "Array.from({length: 2000}, (_, seed) => numbers({...state, seed}).pairs.target.map(r => r.indexOf(true)))"
        )

    first = draws()
    assert first == draws()
    for i in range(5):
        counts = [sum(row[i] == j for row in first) for j in range(5) if j != i]
        assert sum(counts) == 2000 and all(430 < count < 570 for count in counts)  # 500, and 3.6 sigma


def test_arrows_point_down_the_slope_and_grow_with_it(page):
    preset(page, 6)
    gradient = page.evaluate("numbers(state).gradient")
    lines = page.evaluate("""() => points.slice(0, state.G).map(({arrow}) => arrow.style.display === "none" ? null :
        ["x1", "y1", "x2", "y2"].map(a => Number(arrow.getAttribute(a))))""")
    seen = []
    for slope, line in zip(gradient, lines, strict=True):
        assert (line is None) == (abs(slope) < 0.0065), slope  # too short to be seen
        if line:
            (x, y, to_x, to_y) = line
            counterclockwise = x * -(to_y - y) - (-y) * (to_x - x)  # y grows downwards on a screen
            assert counterclockwise * slope < 0
            seen.append((abs(slope), math.hypot(to_x - x, to_y - y)))
    lengths = [length for _, length in sorted(seen)]
    assert len(lengths) > 8 and lengths == sorted(lengths)


# ----------------------------------------------------------------------------------------------------
# Hands, keys and training
# ----------------------------------------------------------------------------------------------------


def angles(page):
    return page.evaluate("state.angles.slice(0, state.G)")


def test_dragging_turns_a_point_and_all_numbers_follow(page):
    before, L, there = angles(page), column(page, "L"), point(page, 5).locator(".badge").bounding_box()
    circle = page.locator("#circle").bounding_box()
    x, y = there["x"] + there["width"] / 2, there["y"] + there["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(circle["x"] + 20, circle["y"] + circle["height"] / 2, steps=5)
    page.mouse.move(circle["x"] + circle["width"] / 2 - 30, circle["y"] + 10, steps=5)  # to the other four
    page.mouse.up()
    after = angles(page)
    assert after[:4] + after[5:] == before[:4] + before[5:]
    assert 75 < after[4] < 120 and page.evaluate("state.right[4]")  # and it is still right
    assert column(page, "L")[4] < L[4] / 2 and "▼" not in table(page)[4][3]


def test_a_click_makes_right_and_wrong(page):
    for verdict, sign in (("wrong", "◇"), ("right", "●")):
        point(page, 2).locator(".badge").click()
        assert point(page, 2).get_attribute("aria-label") == f"Rollout 2, {verdict}"
        assert table(page)[1][0] == f"{sign} 2"
    assert angles(page) == page.evaluate("PRESETS[0].angles")


def test_keys_do_all_that_a_hand_does(page):
    page.locator("#presets button").last.focus()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Rollout 1, right"
    halo = "getComputedStyle(document.activeElement.querySelector('.halo')).strokeWidth"
    assert page.evaluate(halo) == "4px"  # the focus is seen
    L = column(page, "L")
    for key, angle in (
        ("ArrowLeft", 79), ("ArrowDown", 78), ("ArrowUp", 79), ("ArrowRight", 80), ("PageDown", 70), ("PageUp", 80),
        ("Shift+ArrowLeft", 70), ("End", 359), ("ArrowRight", 0), ("ArrowLeft", 359), ("Home", 0),
    ):  # fmt: skip
        page.keyboard.press(key)
        assert angles(page)[0] == angle and point(page, 1).get_attribute("aria-valuenow") == str(angle)
    assert column(page, "L") != L
    for key, verdict in (("Enter", "wrong"), ("Space", "right")):
        page.keyboard.press(key)
        assert point(page, 1).get_attribute("aria-label") == f"Rollout 1, {verdict}"


def test_sliders_choices_and_boxes_change_the_settings(page):
    for name, value in (("G", 11), ("tau", 0.3), ("weight", 1.5), ("reward_floor", -0.7), ("reward_ceiling", 0.4)):
        page.locator(f"#{name}").fill(str(value))
        assert page.evaluate(f"state.{name}") == value
        shown = page.locator("label", has=page.locator(f"#{name}")).locator(".value").inner_text()
        assert float(shown.replace("\u2212", "-")) == value
    assert page.locator("[role=slider]:visible").count() == len(table(page)) == 11
    for name, choices in (("contrastive_kind", KINDS), ("contrastive_scope", SCOPES)):
        assert page.locator(f"#{name} option").evaluate_all("all => all.map(o => o.value)") == list(choices)
        for choice in choices:
            page.locator(f"#{name}").select_option(choice)
            assert page.evaluate(f"state.{name}") == choice
    marks = page.locator("#circle g.if-other path:visible")
    assert marks.count() == 11
    page.locator("#contrastive_scope").select_option("group")
    assert marks.count() == 0
    for name in ("center_hidden", "reward_from_chance"):
        page.locator(f"#{name}").check()
        assert page.evaluate(f"state.{name}") is True
    page.get_by_role("button", name="Paper's constants", exact=True).click()
    assert page.locator("#tau").input_value() == "0.05" and not page.locator("#center_hidden").is_checked()


def test_draw_again_draws_other_positives_and_shows_them(page):
    first = [row[1] for row in table(page)]
    assert first[:5] == ["3", "1", "2", "2", "4"] and page.locator(".lines .drawn:visible").count() > 0
    framed = page.locator("#cosines td.drawn-cell")
    assert framed.count() == 5
    page.get_by_role("button", name="Draw again").click()
    assert [row[1] for row in table(page)] != first and angles(page) == page.evaluate("PRESETS[0].angles")
    page.locator("#contrastive_kind").select_option("supcon_out")
    assert framed.count() == 0 and page.get_by_role("button", name="Draw again").is_disabled()


STOPPED_BELOW_3 = """button => new Promise(done => {  // looks at every frame: on a busy machine training could be over
  const look = () => {
    if (numbers(state).mean_loss >= 3) return requestAnimationFrame(look);
    button.click();
    done(button.textContent);
  };
  requestAnimationFrame(look);
})"""


@pytest.mark.parametrize("motion", ["no-preference", "reduce"])
def test_training_moves_points_down_the_slope_and_back(page, motion):
    page.emulate_media(reduced_motion=motion)
    page.locator("#contrastive_kind").select_option("supcon_out")
    before, loss = angles(page), "numbers(state).mean_loss"
    at_first = page.evaluate(loss)
    train = page.locator("#train")
    said = train.evaluate("button => { button.click(); return button.textContent; }")  # before any frame is drawn
    if motion == "reduce":  # at once, without animation
        assert said == "Train the head"
    else:
        assert said == "Stop"
        assert train.evaluate(STOPPED_BELOW_3) == "Train the head"
    stopped = angles(page)
    assert page.evaluate(loss) < 0.7 * at_first and stopped != before
    page.wait_for_timeout(100)
    assert angles(page) == stopped
    page.get_by_role("button", name="Back to before").click()
    assert angles(page) == before and page.evaluate(loss) == at_first


# ----------------------------------------------------------------------------------------------------
# The story: each preset shows what its text says, and what it says to try
# ----------------------------------------------------------------------------------------------------


def text(page):
    return page.locator("#text").inner_text()


def test_every_preset_has_a_short_text_and_comes_back_as_it_was(page):
    for number in range(1, 7):
        preset(page, number)
        first = table(page), page.locator("#formula").inner_text()
        assert "Try: " in text(page) and 3 <= len(re.findall(r"[.:](\s|$)", text(page))) <= 7
        assert page.locator("#presets [aria-pressed=true]").inner_text().startswith(str(number))
        page.get_by_role("button", name="Our constants").click()
        point(page, 1).press("PageUp")
        preset(page, number)
        assert (table(page), page.locator("#formula").inner_text()) == first


def test_agreement(page):
    L, rc = column(page, "L")[:5], column(page, "rc")[:5]
    assert L.index(max(L)) == 4 and rc.index(min(rc)) == 4 and min(rc[:4]) > -0.3
    again = page.get_by_role("button", name="Draw again")
    drew = set()
    for _ in range(8):
        again.click()
        for i, row in enumerate(table(page)[:4]):
            if row[1] == "5":
                drew.add(column(page, "rc")[i])
    assert drew == {-0.5}  # who draws 5 is paid little, too


def test_a_lone_right_answer(page):
    preset(page, 2)
    assert [row[2:4] for row in table(page)] == [["–", "–"]] * 8 and column(page, "R") == [1] + [0] * 7
    expected = group_advantages(torch.tensor([[1.0] + [0.0] * 7]))[0].tolist()
    assert column(page, "A") == pytest.approx(expected, abs=0.0006)
    point(page, 2).locator(".badge").click()
    assert page.locator("#summary").inner_text().startswith("Anchors: 2.")


def test_everyone_right(page):
    preset(page, 3)
    assert column(page, "R") == [1] * 8 and column(page, "A") == [0] * 8
    assert page.locator("#summary").inner_text().startswith("No anchor here")
    page.locator("#contrastive_scope").select_option(label="wrong rollouts of all questions")
    assert page.locator("#summary").inner_text().startswith("Anchors: 8") and any(column(page, "A"))


def test_the_floor(page):
    preset(page, 4)
    n = sum(row[0].startswith("●") for row in table(page))
    L, rc = column(page, "L")[:n], column(page, "rc")[:n]
    assert f"n = {n}" in text(page) and f"log {n - 1} = {math.log(n - 1):.3f}" in text(page)
    assert all(abs(x - math.log(n - 1)) < 0.01 for x in L) and set(rc) == {-0.48} and "\u22120.480" in text(page)
    page.locator("#contrastive_kind").select_option("decoupled")
    assert set(column(page, "L")[:n]) == {0}


def test_unsound_majority(page):
    preset(page, 5)
    rc = column(page, "rc")
    assert min(rc[:6]) > max(rc[6:9])
    for number in (1, 2, 3, 4):
        point(page, number).locator(".badge").click()
    rc = column(page, "rc")
    assert max(rc[4:6]) < min(rc[6:9])


def test_the_papers_constants_against_ours(page):
    preset(page, 6)
    cells = page.locator("#against td").all_inner_texts()
    (paper_floor, anchors), (ours_floor, _) = (re.findall(r"\d+", cells[i]) for i in (2, 6))
    assert int(paper_floor) > int(anchors) / 2 and anchors == "8" and ours_floor == "0"
    paper = column(page, "rc")[:8]
    assert [float(c.replace("\u2212", "-")) for c in cells[:2]] == [min(paper), max(paper)]
    page.get_by_role("button", name="Our constants").click()
    ours = column(page, "rc")[:8]
    assert [float(c.replace("\u2212", "-")) for c in cells[4:6]] == [min(ours), max(ours)]
    assert max(ours[0], ours[7]) < min(ours[1:7])  # the middle is paid most
    point(page, 8).press("Shift+ArrowLeft")
    point(page, 8).press("Shift+ArrowLeft")
    assert column(page, "rc")[7] > ours[7]
    preset(page, 1)
    assert not page.locator("#against").is_visible()


# ----------------------------------------------------------------------------------------------------
# Everybody can read it
# ----------------------------------------------------------------------------------------------------


def test_every_control_has_a_name(page):
    roles = re.findall(r"- '?(slider|button|combobox|checkbox)\b([^\n]*)", page.locator("body").aria_snapshot())
    assert len(roles) == 8 + 5 + 2 + 2 + 6 + 2 + 3  # points, sliders, choices, boxes, presets, constants, training
    assert all(re.match(r' "[^"]{3,}"', rest) for _, rest in roles), roles
    page.locator("#G").fill("16")
    for handle in page.locator("[role=slider]").all():
        said = handle.get_attribute("aria-valuetext")
        assert re.fullmatch(r"\d+ degrees; (L \S+, rc \S+|no anchor), R \S+, A \S+", said), said


def test_a_screen_reader_hears_the_end_of_a_change(page):
    point(page, 5).press("PageDown")
    said = page.locator("#summary").inner_text()
    assert page.locator("#live[role=status]").text_content() != said
    wait_for(page, "$('live').textContent === $('summary').textContent")


@pytest.mark.parametrize("width", [390, 700, 900, 1280, 1600])
def test_nothing_sticks_out_at_the_side(open_page, width):
    page = open_page(PAGE, width)
    for number in range(1, 7):
        preset(page, number)
        if number == 6:
            page.get_by_role("button", name="Our constants").click()
            page.locator("#G").fill("16")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        cut = page.evaluate("""() => [...document.querySelectorAll("td, th, button, label, code, #text p")]
            .filter(e => e.clientWidth && e.scrollWidth > e.clientWidth + 1).map(e => e.textContent)""")
        assert not [what for what in cut if what], cut


def test_badges_never_cover_each_other(page):
    draw = random.Random(1)
    for crowd in (1, 60, 360):
        page.evaluate(SHOW, {"G": 16, "angles": [draw.uniform(0, crowd) for _ in range(16)]})
        places = page.evaluate("points.map(({text}) => ['x', 'y'].map(a => Number(text.getAttribute(a))))")
        nearest = min(math.dist(a, b) for i, a in enumerate(places) for b in places[:i])
        assert nearest > 20


def luminance(css):
    channels = [int(c) / 255 for c in re.findall(r"\d+", css)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_contrast_enough(page, scheme):
    """WCAG 2.2, 1.4.3: 4.5 to 1 against what is behind it."""
    page.emulate_media(color_scheme=scheme)
    preset(page, 6)
    page.evaluate("rows.forEach(row => row.classList.add('lit'))")  # as when all were pointed at
    pairs = page.evaluate("""() => [...document.querySelectorAll("body *")]
        .filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()) && e.getClientRects().length
                     && !e.matches("button:disabled, option, script"))
        .map(e => {
          const behind = x => getComputedStyle(x).backgroundColor, badge = e.closest(".point")?.querySelector(".badge");
          let under = e;
          while (under.parentElement && behind(under) === "rgba(0, 0, 0, 0)") under = under.parentElement;
          const ink = e instanceof SVGElement ? getComputedStyle(e).fill : getComputedStyle(e).color;
          return [ink, badge ? getComputedStyle(badge).fill : behind(under), e.textContent];
        })""")
    assert len(pairs) > 300
    for ink, behind, what in pairs:
        light, dark = sorted((luminance(ink), luminance(behind)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (what, ink, behind)


def test_right_and_wrong_differ_by_shape_and_fill(page):
    shapes = page.evaluate("""() => points.slice(0, 8).map(({badge}) =>
        [badge.getAttribute("d").includes("a"), getComputedStyle(badge).fill === getComputedStyle(badge).stroke])""")
    assert shapes == [[True, True]] * 5 + [[False, False]] * 3  # filled discs, hollow diamonds


def test_it_is_one_file_that_asks_for_nothing_and_is_not_long():
    source = PAGE.read_text(encoding="utf-8")
    assert "default-src 'none'" in source
    assert not re.search(r"\b(src|href)=|https?://(?!www\.w3\.org)|@import|url\((?!#)", source)
    assert len(source.splitlines()) <= 700


# ----------------------------------------------------------------------------------------------------
# Its picture
# ----------------------------------------------------------------------------------------------------


def test_a_command_takes_the_picture(browser, tmp_path):
    file = tmp_path / "new" / "playground.png"  # by a process of its own: here a browser is open already
    command = [sys.executable, "-m", "exercises.picture", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{file}\n"), done.stderr
    assert file.read_bytes()[:4] == b"\x89PNG" and 50_000 < file.stat().st_size < 160_000


def test_mistakes_get_one_line_and_status_2(tmp_path, capsys, monkeypatch):
    def no_playwright(name, *rest):
        if name.startswith("playwright"):
            raise ImportError(name)
        return real(name, *rest)

    def said(arguments):
        assert picture.main(arguments) == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ") and message.count("\n") == 1
        return message

    assert "expected one file" in said(["a", "b"]) and "expected one file" in said(["--help-me"])
    real = builtins.__import__
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", no_playwright)
        assert "pip install playwright" in said([str(tmp_path / "p.png")])
    pytest.importorskip("playwright.sync_api")
    monkeypatch.setattr(picture.shutil, "which", lambda name: None)
    assert "apt install chromium" in said([str(tmp_path / "p.png")])
