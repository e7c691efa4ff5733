"""The labeling page in Debian's Chromium: keys, dragging, reloads, leases, several labelers, and failures."""

import os
import shutil
import time

import pytest
import sqlalchemy as sa
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.labels import ranking, served
from tunetrail.labeling.app import access, queue
from tunetrail.labeling.app.database import assignments
from tunetrail.labeling.app.store import Store

CHROMIUM = shutil.which("chromium")
if CHROMIUM is None and os.environ.get("CI"):
    raise RuntimeError("chromium is not installed; .ci/run installs it")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
expect.set_options(timeout=20_000)
MARKUP = (
    '# Title\n\n```python\ndef f(x):\n    return "<b>" + x\n```\n<script>window.stolen = 1</script><img src=x '
    'onerror="window.stolen = 1">\n\n[link](https://example.org)'
)


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def store(tmp_path) -> Store:
    store = Store(f"sqlite:///{tmp_path}/labels.db")
    store.publish([ranking("a", 4), ranking("b", 2), ranking("c", 9)], {"overlap": 2})
    return store


@pytest.fixture
def address(store):
    with served(store) as address:
        yield address


class Desk:
    """A labeler at a browser. Any message in the page's console fails the test."""

    def __init__(self, browser: Browser, store: Store, address: str, admin: bool = False, **context):
        self.pseudonym, self.token = access.add_labeler(store, "Ada", admin)
        self.address, self.said = address, []
        still = {"reduced_motion": "reduce", "viewport": {"width": 1280, "height": 900}}
        self.page: Page = browser.new_context(**(still | context)).new_page()
        self.page.set_default_timeout(30_000)
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.goto(f"{address}/enter#{self.token}")
        self.page.wait_for_url(f"{address}/")

    def open(self) -> Page:
        self.page.goto(f"{self.address}/task")
        return self.page

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def tray(self) -> str:
        """The current ranking, such as "C AB | D": groups, best first, then outputs that are not placed."""
        groups = [
            "".join(group.locator(".chip").all_inner_texts()) for group in self.page.locator("#groups .group").all()
        ]
        return " ".join(groups) + " | " + "".join(self.page.locator("#unplaced .chip").all_inner_texts())

    def submitted(self) -> None:
        with self.page.expect_navigation(url="**/task?stored=*"):
            self.press("Enter")


@pytest.fixture
def ada(browser, store, address):
    desk = Desk(browser, store, address)
    yield desk
    desk.page.context.close()
    assert desk.said == []


def by_letters(row: dict) -> str:
    """A stored ranking in the letters that were shown: "C AB"."""
    shown = {output: "ABCDEFGHI"[place] for place, output in enumerate(row["shown"])}
    groups = [sorted(shown[i] for i, r in enumerate(row["ranks"]) if r == rank) for rank in sorted(set(row["ranks"]))]
    return " ".join("".join(group) for group in groups)


def test_ranking_with_keys_only(ada, store):
    ada.open()
    ada.press("Enter")
    expect(ada.page.locator("#alert")).to_have_text("Not placed yet: A, B, C, D.")
    ada.press("t")
    expect(ada.page.locator("#alert")).to_have_text("Choose an output first: press its letter.")
    ada.press("c", "a", "b")
    expect(ada.page.locator("#alert")).to_be_hidden()
    assert ada.tray() == "C A B | D"
    ada.press("t")
    assert ada.tray() == "C AB | D"
    ada.press("d", "ArrowLeft")
    assert ada.tray() == "C ABD | "
    ada.press("ArrowLeft")
    assert ada.tray() == "C D AB | "
    ada.press("ArrowRight", "ArrowRight")
    assert ada.tray() == "C AB D | "
    ada.press("z", "z", "z", "Backspace")
    assert ada.tray() == "C AB | D"
    ada.press("r")
    expect(ada.page.locator("#status")).to_contain_text("D: rank 3")
    ada.press("7", "m", "Space", "Escape", "x", "w")
    ada.page.keyboard.type("both A and b are fine")  # letters in a text field are text
    ada.press("Escape")
    expect(ada.page.locator("[data-rank='1']")).to_have_text("rank 2, tied with A")
    ada.submitted()
    (row,) = store.labels()
    assert by_letters(row) == "C AB D"
    d = row["shown"][3]
    assert (row["ratings"][d], row["flags"][d]) == (7, ["instruction"])
    assert (row["all_bad"], row["comment"]) == (True, "both A and b are fine")
    expect(ada.page.locator("#stored")).to_contain_text(f"Stored as event {row['event']}.")


def test_help_and_skip_by_keys(ada, store):
    ada.open()
    ada.press("?")
    expect(ada.page.locator("#help")).to_be_visible()
    ada.press("a", "Escape")
    expect(ada.page.locator("#help")).to_be_hidden()
    assert ada.tray() == " | ABCD", "keys are not for the page while a dialog is open"
    ada.press("s")
    expect(ada.page.locator("#skip")).to_be_visible()
    ada.press("ArrowDown")
    with ada.page.expect_navigation(url="**/task?stored=*"):
        ada.press("Enter")
    (row,) = store.labels()
    assert (row["task"], row["skipped"], row["ranks"]) == ("a", "expertise", None)
    assert ada.page.locator(".output").count() == 2, "the next task"


def test_undo_restores_the_answer(ada, store):
    ada.open()
    ada.press("b", "a", "t", "d", "c", "3")
    ada.submitted()
    with ada.page.expect_navigation():
        ada.press("u")
    assert ada.tray() == "AB D C | "
    assert store.labels() == []
    assert ada.page.locator("[data-rating]:checked").get_attribute("value") == "3"
    ada.press("c", "ArrowLeft", "ArrowLeft")
    ada.submitted()
    assert [by_letters(row) for row in store.labels()] == ["AB C D"]
    ada.page.goto(ada.address)
    with ada.page.expect_navigation(url="**/task"):
        ada.page.get_by_role("button", name="Change").first.click()
    assert ada.tray() == "AB C D | "


def drag(page: Page, what: str, where: str) -> None:
    start, end = page.locator(what).bounding_box(), page.locator(where).bounding_box()
    page.mouse.move(start["x"] + start["width"] / 2, start["y"] + start["height"] / 2)
    page.mouse.down()
    page.mouse.move(start["x"], start["y"] - 30, steps=3)
    end = page.locator(where).bounding_box()  # gaps widen when a drag starts
    page.mouse.move(end["x"] + end["width"] / 2, end["y"] + end["height"] / 2, steps=6)
    page.mouse.up()


def test_dragging(ada, store):
    page = ada.open()
    drag(page, "#unplaced [data-chip='1']", "#groups [data-drop='before 0']")
    assert ada.tray() == "B | ACD"
    drag(page, "#output-0 .chip", "#groups [data-drop='group 0']")  # from the output itself
    assert ada.tray() == "AB | CD"
    drag(page, "#unplaced [data-chip='3']", "#groups [data-drop='before 0']")
    drag(page, "#unplaced [data-chip='2']", "#groups [data-drop='before 1']")
    assert ada.tray() == "D C AB | "
    drag(page, "#groups [data-chip='0']", "#unplaced")
    assert ada.tray() == "D C B | A"
    drag(page, "#unplaced [data-chip='0']", "#groups [data-drop='before 3']")
    drag(page, "#groups [data-chip='3']", "#groups [data-drop='before 2']")
    assert ada.tray() == "C D B A | "
    page.locator("#submit").click()
    page.wait_for_url("**/task?stored=*")
    assert [by_letters(row) for row in store.labels()] == ["C D B A"]


def test_a_reload_keeps_the_order_shown_and_the_draft(ada):
    page = ada.open()
    shown = page.locator(".output .rendered").all_inner_texts()
    ada.press("d", "b", "5", "w")
    page.keyboard.type("half a thought")
    expect(page.locator("#saved")).to_have_text("Draft saved")
    page.reload()
    assert page.locator(".output .rendered").all_inner_texts() == shown
    assert ada.tray() == "D B | AC"
    assert page.locator("#comment").input_value() == "half a thought"
    assert page.locator("#output-1 [data-rating]:checked").get_attribute("value") == "5"


def test_two_labelers_at_once_and_a_lease_that_expires(ada, browser, store, address):
    store.publish([ranking("a", 4), ranking("b", 2)], {"overlap": 1})
    ada.open()
    bob = Desk(browser, store, address)
    bob.open()
    assert (ada.page.locator(".output").count(), bob.page.locator(".output").count()) == (4, 2)
    with store.writing() as connection:  # Ada goes to lunch
        connection.execute(
            sa.update(assignments).where(assignments.c.labeler == ada.pseudonym).values(expires=time.time() - 1)
        )
    bob.press("a", "b")
    bob.submitted()
    assert bob.page.locator(".output").count() == 4, "Ada's task is free again"
    bob.press("a", "b", "c", "d")
    bob.submitted()
    ada.press("d", "c", "b", "a", "Enter")
    expect(ada.page.locator("#alert")).to_contain_text("your time for this task has run out")
    assert {row["labeler"] for row in store.labels()} == {bob.pseudonym}
    expect(bob.page.locator("h1")).to_have_text("That is all for you")
    assert any("409" in line for line in ada.said)
    ada.said.clear()
    bob.page.context.close()


def test_an_unreachable_server_is_reported_and_nothing_on_the_page_is_lost(ada, store):
    away = True
    # Routed before the page is opened: a page that is already open may send another request past a new route.
    ada.page.context.route("**/submit", lambda route: route.abort() if away else route.continue_())
    page = ada.open()
    ada.press("a", "b", "c", "d")
    ada.press("Enter")
    expect(page.locator("#alert")).to_contain_text("It is unclear whether this was stored: the server does not answer")
    away = False
    ada.said.clear()
    ada.submitted()
    assert [by_letters(row) for row in store.labels()] == ["A B C D"]


def test_pressing_enter_twice_stores_once(ada, store):
    ada.open()
    ada.press("a", "b", "c", "d")
    with ada.page.expect_navigation(url="**/task?stored=*"):
        ada.press("Enter", "Enter", "Enter")
    assert len(store.labels()) == 1


def test_writing_an_answer_and_editing_the_models(ada, store):
    store.publish([
        {"id": "w", "kind": "demonstration", "prompt": "Describe zip."},
        {"id": "e", "kind": "demonstration", "prompt": "Describe map.", "draft": "Maps."},
    ])  # fmt: skip
    page = ada.open()
    ada.press("Control+Enter")
    expect(page.locator("#alert")).to_have_text("Write an answer first, or skip the task.")
    page.keyboard.type("Pairs items.\nsu?")  # the page's shortcut keys are text here
    expect(page.locator("#count")).to_have_text("3 words")
    expect(page.locator("#saved")).to_have_text("Draft saved")
    page.reload()
    with page.expect_navigation(url="**/task?stored=*"):
        ada.press("Control+Enter")
    assert page.locator("#text").input_value() == "Maps."
    ada.press("Control+End")
    page.keyboard.type(" More.")
    with page.expect_navigation(url="**/task?stored=*"):
        ada.press("Control+Enter")
    rows = store.labels()
    assert [(row["kind"], row["text"], row["labeler"]) for row in rows] == [
        ("demonstration", "Pairs items.\nsu?", ada.pseudonym),
        ("demonstration", "Maps. More.", ada.pseudonym),
    ]


def test_markdown_and_code_are_shown_and_scripts_are_not_run(ada, store):
    store.publish([ranking("m", prompt=MARKUP, completions=[MARKUP, "  two\n  spaces"])])
    page = ada.open()
    assert page.locator(".output pre code").first.inner_text() == 'def f(x):\n    return "<b>" + x\n'
    assert page.locator(".output .text h1").count() == 1
    assert page.locator("main a, main img, main script").count() == 0
    assert page.evaluate("window.stolen") is None
    ada.press("v")
    assert MARKUP in page.locator(".raw:visible").all_inner_texts()
    page.evaluate(
        "() => { const s = document.createElement('script'); s.textContent = 'window.stolen = 2'; "
        "document.body.append(s); }"
    )
    assert page.evaluate("window.stolen") is None, "the policy forbids scripts in the page"
    assert any("Content Security Policy" in line for line in ada.said)
    ada.said.clear()


def test_a_wrong_token_and_leaving(browser, store, address):
    page = browser.new_page()
    page.goto(f"{address}/task")
    page.wait_for_url("**/enter")
    page.get_by_label("Token").fill("wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#alert")).to_contain_text("this token is not known")
    page.get_by_label("Token").fill(access.add_labeler(store, "Bob")[1])
    page.keyboard.press("Enter")
    page.wait_for_url(f"{address}/")
    assert page.evaluate("document.cookie") == "", "scripts cannot read the cookie"
    page.get_by_role("button", name="Leave").click()
    page.wait_for_url("**/enter")
    page.goto(f"{address}/task")
    page.wait_for_url("**/enter")
    page.close()


def test_a_link_pasted_while_the_entrance_is_open(browser, store, address):
    page = browser.new_page()
    page.goto(f"{address}/enter")
    page.goto(f"{address}/enter#{access.add_labeler(store, 'Bob')[1]}")
    page.wait_for_url(f"{address}/")
    page.close()


CONTRASTS = """() => {
    const read = colour => colour.match(/[\\d.]+/g).map(Number);
    const luminance = rgb => rgb.slice(0, 3).map(c => c / 255)
        .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
    const behind = e => {
        for (; e; e = e.parentElement) {
            const colour = read(getComputedStyle(e).backgroundColor);
            if (colour.length < 4 || colour[3] === 1) return colour;
        }
        return [255, 255, 255];
    };
    return [...document.querySelectorAll("body *:not(svg *)")]
        .filter(e => e.checkVisibility() && !e.disabled)
        .filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()))
        .map(e => {
            const [a, b] = [luminance(read(getComputedStyle(e).color)), luminance(behind(e))].sort((x, y) => y - x);
            return [(a + 0.05) / (b + 0.05), e.outerHTML.slice(0, 120)];
        });
}"""
"""[contrast, element] of all text outside of figures, by WCAG 2.1's formula; translucent backgrounds are looked
through.
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_is_wider_than_the_screen_and_dark_mode_is_dark(browser, store, address, width, scheme):
    long = "x" * 400
    outputs = [f"{n} {long}\n\n    {long}" for n in range(9)]
    wide = [ranking(name, prompt=f"{name} {long}") | {"completions": outputs} for name in ("g", "a", "l")]
    wide[0]["gold"] = {"ranks": list(range(1, 10))}
    store.publish(wide, {"guidelines": f"# G\n\n{long}", "training": 1, "overlap": 2})
    desk = Desk(browser, store, address, admin=True, viewport={"width": width, "height": 800}, color_scheme=scheme)
    trained = queue.submit(
        store, desk.pseudonym, queue.next_task(store, desk.pseudonym).nonce, {"ranks": list(range(1, 10))}
    )
    for name in (desk.pseudonym, "human-9"):
        while (given := queue.next_task(store, name)) and given.task["id"] != "l":
            queue.submit(store, name, given.nonce, {"ranks": list(range(1, 10))})
    shows = {
        "": "main",
        "task": "article.output",
        "guidelines": "h1",
        "quality": ".chart svg",
        f"feedback?event={trained.event}": "h1",
    }
    for path, part in shows.items():
        assert desk.page.goto(f"{address}/{path}").status == 200
        assert desk.page.locator(part).count() > 0
        assert desk.page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0, path
        faint = [found for found in desk.page.evaluate(CONTRASTS) if found[0] < 4.5]
        assert faint == [], path
    light = desk.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert light == (scheme == "light")
    desk.page.context.close()


def touch_drag(page: Page, what: str, where: str) -> None:
    """A finger that moves; Playwright itself can only tap."""
    touch = page.context.new_cdp_session(page)

    def send(kind: str, *at: float) -> None:
        points = [{"x": at[0], "y": at[1]}] if at else []
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    def middle(selector: str) -> tuple[float, float]:
        box = page.locator(selector).bounding_box()
        return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

    x, y = middle(what)
    send("touchStart", x, y)
    send("touchMove", x, y - 20)
    send("touchMove", *middle(where))
    send("touchEnd")


def test_by_touch_on_a_phone(browser, store, address):
    desk = Desk(browser, store, address, viewport={"width": 390, "height": 800}, has_touch=True, is_mobile=True)
    page = desk.open()
    for letter in ("B", "A", "D", "C"):
        page.locator("#unplaced").get_by_text(letter, exact=True).tap()
    page.get_by_role("button", name="Better").tap()
    assert desk.tray() == "B A CD | "
    touch_drag(page, "#groups [data-chip='1']", "#groups [data-drop='before 3']")
    assert desk.tray() == "A CD B | "
    touch_drag(page, "#groups [data-chip='1']", "#groups [data-drop='before 0']")
    page.locator("#submit").tap()
    page.wait_for_url("**/task?stored=*")
    assert [by_letters(row) for row in store.labels()] == ["B A CD"]
    page.context.close()


def test_the_page_works_with_screen_readers(ada):
    page = ada.open()
    ada.press("c", "a", "t")
    chip = page.locator("#groups").get_by_role("button", name="Output A, rank 1, tied with C")
    expect(chip).to_have_attribute("aria-pressed", "true")
    expect(page.locator("#status")).to_have_text("A: rank 1, tied with C")
    chip.focus()
    ada.press("ArrowRight")
    expect(page.locator("#groups").get_by_role("button", name="Output A, rank 2")).to_be_focused()
    page.locator("#unplaced [data-chip='3']").focus()
    ada.press("Enter")
    assert ada.tray() == "C A D | B", "a button that has the focus does what it says"
    ada.press("z")
    snapshot = page.locator("body").aria_snapshot()
    rating = "Rating from 1 (bad) to 7 (excellent)"
    for line in ('list "Ranking, best first"', 'region "Outputs"', rating, 'button "Submit'):
        assert line in snapshot


def test_the_quality_page(browser, store, address):
    gold = [ranking(f"g{n}", gold={"ranks": [1, 2, 3]}) for n in range(2)]
    store.publish(
        [*gold, *(ranking(f"t{n}", 2 + n % 4) for n in range(12))], {"overlap": 3, "gold_every": 6, "repeat_every": 6}
    )
    for name in ("human-1", "human-2"):
        while given := queue.next_task(store, name):
            queue.submit(store, name, given.nonce, {"ranks": [i + 1 for i in given.shown]})  # always the task's order
    desk = Desk(browser, store, address, admin=True)
    page = desk.page
    page.goto(f"{address}/quality")
    assert page.locator(".chart svg").count() == 4
    for figure in page.locator(".chart svg").all():
        assert figure.bounding_box()["width"] > 200
    expect(page.locator(".facts")).to_contain_text("24 of 36")
    expect(page.locator("tbody").first).to_contain_text("human-2")
    row = page.get_by_role("row", name="human-1").locator("td").all_inner_texts()
    assert row[:2] == ["12", "0"]
    assert row[2].startswith("100%"), "agrees with gold"
    assert row[3].startswith("100%"), "agrees with itself"
    expect(page.locator(".chain")).to_contain_text(f"The chain of events is intact. Its head: {store.head()}")
    with store.writing() as connection:
        connection.exec_driver_sql("DROP TRIGGER events_no_update")
        connection.exec_driver_sql("UPDATE events SET labeler = 'human-2' WHERE number = 2")
    page.reload()
    expect(page.locator(".chain")).to_contain_text("broken: event 2 is not what was written")
    assert desk.said == []
    page.context.close()
