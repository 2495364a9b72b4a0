"""The app as people meet it: headless Chromium on the real page, with models trained here.

`Gate` stands between the tokens of every answer, so that a test sees an answer half written for
as long as it looks, and nothing depends on how fast the machine is.
"""

from __future__ import annotations

import http.client
import json
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

pytest.importorskip("gradio", reason='the app needs its extra: pip install -e ".[app]"')
pytest.importorskip("playwright", reason='browser tests need playwright: pip install -e ".[dev]"')

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect, sync_playwright

from apps import chat, progress_tab
from apps.markup import coloured, pane, writing
from apps.scores import TokenScore
from apps.workbench import Workbench
from rlhf_kit import pipeline
from rlhf_kit.hybrid_engine.decode import Decoder

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium"),
]
SECONDS = 60
"""The longest wait for what has to come; a busy machine may need many."""
expect.set_options(timeout=1000 * SECONDS)
SMALL = {
    "data__rows": (256, 96, 32),
    "ppo__iterations": 2,
    "ppo__batch_size": 16,
    "ppo__minibatch_size": 16,
    "ppo__micro_batch_size": 16,
    "ppo__critic_warmup_iterations": 0,
    "checkpoint__export_every": 1,
}
"""Settings of a toy run of half a minute."""
EVIL = (
    '<img src="http://evil.example/a.png" onerror="window.evil=1">'
    "<script>window.evil=1</script>![x](http://evil.example/b.png)"
)
NOT_OURS_TO_MEND: dict[str, str] = {}
"""axe's rules that Gradio's own markup breaks and no setting mends."""


CUT_OFF = """() => [...document.querySelectorAll("main *")].filter((part) => {
  const box = part.getBoundingClientRect();
  return part.checkVisibility() && box.width > 1 && box.right > innerWidth + 1
    && !part.closest(".table");
}).map((part) => part.id || part.className)"""
"""What lies beyond the right edge; tables scroll within themselves."""


class Gate:
    """Lets tokens through: all of them, or as many as it is told to."""

    def __init__(self) -> None:
        self.tokens = threading.Semaphore(0)
        self.is_open = threading.Event()
        self.is_open.set()
        self.passed = 0

    def close(self) -> None:
        self.is_open.clear()
        self.tokens = threading.Semaphore(0)
        self.passed = 0

    def let(self, count: int) -> None:
        for _ in range(count):
            self.tokens.release()

    def let_until(self, condition: Callable[[], Any]) -> None:
        """One token after the other: which answer takes it, and whether it shows, is open."""
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < deadline, "nothing more is shown"
            self.let(1)
            shown_by = time.monotonic() + 1  # pages are updated a dozen times a second
            while time.monotonic() < shown_by and not condition():
                time.sleep(0.02)

    def open(self) -> None:
        self.is_open.set()

    def wait(self) -> None:
        deadline = time.monotonic() + SECONDS
        while not self.is_open.is_set() and not self.tokens.acquire(timeout=0.02):
            assert time.monotonic() < deadline, "the gate stayed shut"
        self.passed += 1


def until(condition: Callable[[], Any], what: str) -> None:
    """Look again and again until it holds."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


# ---- a run, the app on it, a browser


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy run through all three stages, with few rows."""
    directory = tmp_path_factory.mktemp("app") / "run"
    record = pipeline.open_run(
        directory, preset_name="toy", changes=SMALL, resume=False, command="test"
    )
    assert pipeline.train(directory, record, is_new=True) == 0
    return directory


@pytest.fixture(scope="module")
def gate() -> Iterator[Gate]:
    gate, stream = Gate(), Decoder.stream

    def gated(self: Decoder, *args: Any, **keywords: Any) -> Iterator[Any]:
        for token in stream(self, *args, **keywords):
            gate.wait()
            yield token

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "stream", gated)
        yield gate


@pytest.fixture(scope="module")
def bench(run_dir: Path, gate: Gate) -> Iterator[Workbench]:
    bench = Workbench(run_dir)
    yield bench
    gate.open()
    bench.close()


@pytest.fixture(scope="module")
def url(bench: Workbench) -> Iterator[str]:
    """The app's address; at the end, the server has looked for no other host."""
    hosts: set[Any] = set()
    look_up = socket.getaddrinfo

    def noted(host: Any, *args: Any, **keywords: Any) -> Any:
        hosts.add(host.decode() if isinstance(host, bytes) else host)
        return look_up(host, *args, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", noted)
        blocks, address = chat.start(bench, block=False)
        yield address
        blocks.close(verbose=False)
    assert hosts and hosts <= {"127.0.0.1", "localhost"}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def context(browser: Browser, gate: Gate, url: str) -> Iterator[BrowserContext]:
    """A browser that has never been here; at the end, it has asked nobody but the app."""
    asked: list[str] = []
    context = browser.new_context(viewport={"width": 1280, "height": 900}, locale="en-GB")
    context.set_default_timeout(1000 * SECONDS)
    context.on("requestfinished", lambda request: asked.append(request.url))
    context.on("requestfailed", lambda r: None if r.failure == "csp" else asked.append(r.url))
    yield context
    gate.open()
    context.close()
    here = urlsplit(url).netloc
    assert [a for a in asked if urlsplit(a).netloc not in (here, "")] == []
    assert asked


@pytest.fixture
def page(context: BrowserContext, url: str) -> Page:
    return opened(context, url)


def opened(context: BrowserContext, url: str) -> Page:
    """A page that is ready: its first answer from the server is there."""
    page = context.new_page()
    page.goto(url)
    ready(page)
    return page


def ready(page: Page) -> None:
    expect(page.locator("html[data-ready]")).to_be_attached()


def ask(page: Page, text: str) -> None:
    box = page.locator("#message textarea")
    box.fill(text)
    box.press("Enter")


def answers(page: Page) -> Locator:
    return page.locator("#transcript .turn.model .text")


def questions(page: Page) -> Locator:
    return page.locator("#transcript .turn.you .text")


def tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def press(page: Page, name: str, inside: str = "body") -> None:
    page.locator(inside).get_by_role("button", name=name, exact=True).click()


def choose(page: Page, dropdown: str, option: str) -> None:
    page.get_by_role("combobox", name=dropdown, exact=True).click()
    page.get_by_role("option", name=option, exact=True).click()


def votes(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "votes.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# ---- chat


def test_an_answer_grows_token_by_token_and_a_second_turn_and_a_reload_find_the_first(
    page: Page, gate: Gate
):
    gate.close()
    ask(page, "Name three fruits.")
    writing = page.locator("#answer .text")
    sizes = []
    for _ in range(3):
        before = len(writing.text_content() or "")
        gate.let_until(lambda seen=before: len(writing.text_content() or "") > seen)
        sizes.append(len(writing.text_content() or ""))
    assert sizes == sorted(set(sizes))
    gate.open()
    expect(answers(page)).to_have_count(1)
    assert len(answers(page).inner_text()) > sizes[-1]
    expect(page.locator("#transcript .note")).to_contain_text("tokens/s · first token after")
    expect(page.get_by_role("status").filter(has_text="The answer is finished.")).to_be_attached()

    ask(page, "Now name three more.")
    expect(answers(page)).to_have_count(2)
    expect(questions(page)).to_have_text(["Name three fruits.", "Now name three more."])
    said = answers(page).all_inner_texts()
    page.get_by_role("button", name="Exact prompt").click()
    press(page, "Show what the model reads")
    prompt = page.locator("#prompt .prompt")
    expect(prompt).to_contain_text("Human: Name three fruits.")
    expect(prompt).to_contain_text("Human: Now name three more.\n\nAssistant:")
    assert re.fullmatch(r"\d+", page.locator("#prompt .ids b").first.inner_text())

    page.reload()
    ready(page)
    expect(answers(page)).to_have_count(2)
    assert answers(page).all_inner_texts() == said


def test_stop_ends_the_thread_that_writes_and_keeps_what_was_written(
    page: Page, gate: Gate, bench: Workbench
):
    gate.close()
    ask(page, "How much is 7 plus 3?")
    gate.let_until(lambda: page.locator("#answer .text").text_content())
    passed = gate.passed
    assert bench.generation.running() == 1
    page.locator("#stop").click()
    (answer,) = [answer for answer, _ in bench.generation._current.values() if not answer.reason]
    until(answer.stop.is_set, "Stop did not reach the answer")
    gate.open()
    until(lambda: not bench.generation.running(), "the thread went on")
    assert gate.passed <= passed + 2
    expect(page.locator("#transcript .note")).to_contain_text("stopped")
    expect(page.locator("#stop")).to_be_disabled()
    ask(page, "And 2 plus 2?")  # the device is free
    expect(answers(page)).to_have_count(2)


def test_a_page_that_is_closed_meanwhile_frees_the_device(page: Page, gate: Gate, bench: Workbench):
    gate.close()
    ask(page, "How much is 7 plus 3?")
    gate.let_until(lambda: page.locator("#answer .text").text_content())
    (answer,) = [answer for answer, _ in bench.generation._current.values() if not answer.reason]
    page.close()
    until(answer.stop.is_set, "the server did not notice")
    gate.open()
    until(lambda: not bench.generation.running(), "the thread went on")
    assert answer.reason == "stopped" and gate.passed <= 2


def test_turns_can_be_retried_undone_and_edited_and_another_checkpoint_answers(
    page: Page, bench: Workbench
):
    ask(page, "How much is 7 plus 3?")
    expect(answers(page)).to_have_count(1)
    press(page, "Retry")
    expect(page.locator("#chat-status")).to_be_empty()
    expect(answers(page)).to_have_count(1)
    choose(page, "Checkpoint", "SFT")
    ask(page, "How much is 2 plus 2?")
    expect(answers(page)).to_have_count(2)
    expect(page.locator("#transcript .note").last).to_contain_text("SFT · ")

    press(page, "Edit turn 1")
    editor = page.get_by_role("textbox", name="Edit turn 1")
    expect(editor).to_have_value("How much is 7 plus 3?")
    editor.fill("How much is 5 plus 5?")
    press(page, "Save and answer again")
    expect(questions(page)).to_have_text(["How much is 5 plus 5?"])
    expect(answers(page)).to_have_count(1)

    press(page, "Edit turn 2")
    page.get_by_role("textbox", name="Edit turn 2").fill("Ten.")
    press(page, "Save")
    expect(answers(page)).to_have_text(["Ten."])
    with page.expect_download() as download:
        press(page, "Download")
    kept = [json.loads(line) for line in download.value.path().read_text().splitlines()]
    assert [(m["role"], m["content"]) for m in kept] == [
        ("user", "How much is 5 plus 5?"),
        ("assistant", "Ten."),
    ]
    press(page, "Undo")
    expect(page.locator("#message textarea")).to_have_value("How much is 5 plus 5?")
    expect(answers(page)).to_have_count(0)


def test_markup_in_questions_and_answers_is_shown_as_text_and_asks_for_nothing(page: Page):
    ask(page, EVIL)
    expect(answers(page)).to_have_count(1)
    expect(questions(page)).to_have_text([EVIL])
    press(page, "Edit turn 2")
    page.get_by_role("textbox", name="Edit turn 2").fill(EVIL)
    press(page, "Save")
    expect(answers(page)).to_have_text([EVIL])
    assert page.locator("#talk :is(img, script)").count() == 0
    assert page.evaluate("window.evil") is None
    # Were an image to get in after all, the browser would not fetch it.
    refused = page.evaluate(
        """() => new Promise((done) => {
            document.addEventListener("securitypolicyviolation", (e) => done(e.blockedURI));
            const image = new Image();
            image.onload = image.onerror = () => setTimeout(() => done("asked for"), 1000);
            image.src = "http://evil.example/c.png";
            document.body.append(image);
        })"""
    )
    assert refused == "http://evil.example/c.png"


def test_what_streams_and_what_is_compared_is_escaped_too():
    token = TokenScore(id=1, text="<img src=x>", logprob=-0.1, sft_logprob=None)
    for html in (pane("<img src=x>"), writing("en", "<img src=x>"), coloured("en", [token])):
        assert "&lt;img src=x&gt;" in html and "<img" not in html


# ---- compare


def test_two_models_answer_one_prompt_and_their_scores_stand_below(page: Page, run_dir: Path):
    tab(page, "Compare")
    page.get_by_role("checkbox", name="Blind").uncheck()
    page.locator("#question textarea").fill("How much is 7 plus 3?")
    press(page, "Ask both")
    for side, name in (("a", "EMA"), ("b", "final")):
        region = page.get_by_role("region", name=f"Answer {side.upper()}")
        expect(region).to_contain_text(name)
        expect(region.locator(".text")).not_to_be_empty()
        facts = region.locator(".facts")
        expect(facts).to_contain_text(re.compile(r"Reward score\s*[+-]\d+\.\d\d"))
        expect(facts).to_contain_text(re.compile(r"KL to SFT\s*-?\d+\.\d\d nats"))
        expect(facts).to_contain_text(re.compile(r"Length\s*\d+ tokens"))
    finished = page.get_by_role("status").filter(has_text=re.compile("Answer [AB] finished."))
    expect(finished).to_be_attached()
    page.get_by_role("checkbox", name="Colour tokens by probability").check()
    shaded = page.locator("#answer-a .tokens span")
    expect(shaded.first).to_have_attribute("title", re.compile(r"probability \d\.\d+, logprob -?"))
    before = len(votes(run_dir))
    press(page, "Tie")
    expect(page.locator("#tally")).to_contain_text("EMA wins 50% against final")
    (vote,) = votes(run_dir)[before:]
    assert (vote["verdict"], vote["blind"], vote["while_streaming"]) == ("tie", False, False)
    assert [vote[side]["checkpoint"] for side in "ab"] == ["ema", "final"]


def test_a_blind_vote_by_key_while_both_stream_is_saved_and_then_reveals(
    page: Page, gate: Gate, run_dir: Path, bench: Workbench
):
    tab(page, "Compare")
    gate.close()
    page.locator("#question textarea").fill("How much is 7 plus 3?")
    press(page, "Ask both")
    gate.let_until(lambda: all(page.locator(f"#answer-{x} .text").text_content() for x in "ab"))
    for side in "ab":
        expect(page.locator(f"#head-{side}")).to_contain_text("hidden until you vote")
    expect(page.locator("#vote-b")).to_be_enabled()
    for key in ("End", "2"):  # in the text box it is a letter like others
        page.locator("#question textarea").press(key)
    expect(page.locator("#question textarea")).to_have_value("How much is 7 plus 3?2")
    assert page.locator("#verdict").inner_text() == ""
    before = len(votes(run_dir))
    page.locator("#title").click()
    page.keyboard.press("2")
    expect(page.locator("#verdict")).to_contain_text("Your vote is saved: B is better.")
    first = votes(run_dir)[before]
    assert (first["verdict"], first["blind"], first["while_streaming"]) == ("b", True, True)
    shown = {"ema": "EMA", "final": "final"}
    for side in "ab":
        name = shown[first[side]["checkpoint"]]
        expect(page.locator(f"#head-{side} .model-name")).to_have_text(name)
    expect(page.locator("#head-b")).to_contain_text("your choice")
    expect(page.locator("#vote-a")).to_be_disabled()
    gate.open()
    expect(page.locator("#scores-a .facts")).to_be_visible()
    until(lambda: not bench.generation.running(), "the answers went on")
    whole = votes(run_dir)[-1]  # the vote again, with the answers as they ended
    assert whole["id"] == first["id"]
    assert len(whole["a"]["response"]) > len(first["a"]["response"])


def test_blind_answers_show_no_score_before_the_vote_and_escape_stops_them(
    page: Page, gate: Gate, bench: Workbench
):
    tab(page, "Compare")
    gate.close()
    page.locator("#question textarea").fill("How much is 7 plus 3?")
    page.locator("#question textarea").press("Enter")
    gate.let_until(lambda: all(page.locator(f"#answer-{x} .text").text_content() for x in "ab"))
    page.keyboard.press("Escape")
    running = [answer for answer, _ in bench.generation._current.values() if not answer.reason]
    assert len(running) == 2
    until(lambda: all(answer.stop.is_set() for answer in running), "Escape stopped nothing")
    gate.open()
    expect(page.locator("#line-a")).to_contain_text("stopped")
    expect(page.locator("#scores-a")).to_have_text("Scores appear after your vote.")
    page.get_by_role("button", name="Keyboard").click()
    page.get_by_role("checkbox", name="Single-key shortcuts").uncheck()
    page.locator("#title").click()
    page.keyboard.press("3")
    page.get_by_role("checkbox", name="Single-key shortcuts").check()
    assert page.locator("#verdict").inner_text() == ""
    page.locator("#title").click()
    page.keyboard.press("4")
    expect(page.locator("#verdict")).to_contain_text("Your vote is saved: Both bad.")
    expect(page.locator("#scores-a .facts")).to_be_visible()


def test_a_link_opens_its_pair_and_seed_and_a_wrong_one_says_so(
    context: BrowserContext, url: str, run_dir: Path
):
    page = opened(context, f"{url}?a=sft&b=ema&seed=7")
    expect(page.get_by_role("combobox", name="First model", exact=True)).to_have_value("SFT")
    expect(page.get_by_role("combobox", name="Second model", exact=True)).to_have_value("EMA")
    page.get_by_role("button", name="Link to this pair").click()
    expect(page.locator("#link :is(input, textarea)")).to_have_value("?a=sft&b=ema&seed=7")
    page.locator("#question textarea").fill("How much is 7 plus 3?")
    press(page, "Ask both")
    press(page, "Both bad")
    expect(page.locator("#verdict")).to_contain_text("Your vote is saved")
    vote = votes(run_dir)[-1]
    assert vote["seed"] == 7
    assert {vote[side]["checkpoint"] for side in "ab"} == {"sft", "ema"}
    page.goto(f"{url}?a=../../etc/passwd&b=ema")
    ready(page)
    expect(page.locator("#compare-status")).to_contain_text("names a checkpoint that is not here")


# ---- the page as a whole


def test_the_progress_page_draws_the_checkpoints_and_repeats_them_as_a_table(page: Page):
    tab(page, "Progress")
    charts = page.locator("#charts svg[role=img]")
    expect(charts.first).to_be_visible()
    table = page.get_by_role("region", name="The same numbers as a table")
    rows = table.locator("tbody th").all_inner_texts()
    assert rows[0].startswith("base") and rows[1] == "SFT" and rows[-2:] == ["final", "EMA"]
    expect(page.get_by_role("region", name="Weights, pair by pair")).to_contain_text("ema – sft")


def test_a_click_measures_every_checkpoint_on_held_out_prompts_until_it_is_stopped(
    page: Page, gate: Gate, bench: Workbench, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(progress_tab, "PROMPTS", 1)
    tab(page, "Progress")
    line, stop = page.locator("#progress-status"), page.locator("#measure-stop")
    gate.close()
    press(page, "Measure on held-out prompts")
    expect(line).to_contain_text(re.compile(r"Measuring base .*: 0 of 6"))
    expect(page.locator("#measure")).to_be_disabled()
    stop.click()
    gate.open()
    expect(line).to_have_text("Stopped.")
    expect(stop).to_be_disabled()
    until(lambda: not bench.generation.running(), "the answer went on")

    press(page, "Measure on held-out prompts")
    expect(line).to_have_text("Measured.")
    rows = page.get_by_role("region", name="The same numbers as a table").locator("tbody tr")
    expect(rows).to_have_count(6)
    for row in rows.all():
        expect(row).to_contain_text(re.compile(r"-?\d+\.\d\d, KL -?\d+\.\d\d"))
    expect(page.locator("#charts figure").first).to_contain_text("measured here")


def test_the_page_speaks_chinese_to_a_chinese_browser_and_on_request(
    browser: Browser, page: Page, url: str
):
    page.get_by_role("radio", name="中文").check()
    expect(page.get_by_role("tab", name="对话", exact=True)).to_be_visible()
    expect(page.locator("html")).to_have_attribute("lang", "zh-CN")
    page.locator("#message textarea").fill("你好")
    page.locator("#message textarea").press("Enter")
    expect(page.locator("#transcript .note")).to_contain_text("词元/秒")
    page.locator("#message textarea").fill("长 " * 5_000)
    page.locator("#message textarea").press("Enter")
    expect(page.locator("#chat-status .error")).to_contain_text("消息连同模板共")
    expect(page.locator("#transcript .note")).to_have_count(1)
    page.reload()
    ready(page)
    expect(page.get_by_role("tab", name="对比", exact=True)).to_be_visible()
    with browser.new_context(locale="zh-CN") as context:
        other = opened(context, url)
        expect(other.get_by_role("tab", name="训练进展", exact=True)).to_be_visible()


@pytest.mark.parametrize("locale", ["en-GB", "zh-CN"])
def test_a_telephone_needs_no_sideways_scrolling(browser: Browser, url: str, locale: str):
    viewport = {"width": 390, "height": 844}
    with browser.new_context(viewport=viewport, locale=locale) as context:  # type: ignore[arg-type]
        page = opened(context, url)
        ask(page, "w" * 200)
        expect(answers(page)).to_have_count(1)
        for item in page.get_by_role("tab").all():
            item.click()
            page.wait_for_function("document.fonts.status === 'loaded'")
            assert page.evaluate("document.documentElement.scrollWidth") <= 390
            assert page.evaluate(CUT_OFF) == [], item.inner_text()
        page.get_by_role("tab").nth(1).click()
        tops = {box["y"] for b in page.locator("#votes button").all() if (box := b.bounding_box())}
        assert len(tops) == 1


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_that_breaks_wcag_2_2_aa(context: BrowserContext, url: str, theme: str):
    context.set_default_timeout(1000 * SECONDS)
    page = opened(context, f"{url}?__theme={theme}")
    ask(page, "How much is 7 plus 3?")
    expect(answers(page)).to_have_count(1)
    tags = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]
    options = {"runOnly": {"type": "tag", "values": tags}, "resultTypes": ["violations"]}
    found: dict[str, list[str]] = {}

    def look() -> None:
        for violation in Axe().run(page, options=options).response["violations"]:
            if violation["id"] not in NOT_OURS_TO_MEND:
                found.setdefault(violation["id"], []).extend(n["html"] for n in violation["nodes"])

    page.get_by_role("button", name="Exact prompt").click()
    press(page, "Show what the model reads")
    expect(page.locator("#prompt .ids")).to_be_visible()
    ask(page, "long " * 4_000)
    expect(page.locator("#chat-status .error")).to_be_visible()
    press(page, "Edit turn 1")
    expect(page.get_by_role("textbox", name="Edit turn 1")).to_be_visible()
    look()
    tab(page, "Compare")
    page.get_by_role("button", name="Keyboard").click()
    page.get_by_role("checkbox", name="Blind").uncheck()
    page.get_by_role("checkbox", name="Colour tokens by probability").check()
    page.locator("#question textarea").fill("How much is 7 plus 3?")
    press(page, "Ask both")
    expect(page.locator("#answer-b .tokens")).to_be_visible()
    look()
    tab(page, "Progress")
    expect(page.locator("#charts svg").first).to_be_visible()
    look()
    assert found == {}


def test_every_response_carries_the_safe_headers_and_what_is_not_needed_is_off(url: str):
    def get(path: str) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=SECONDS)
        connection.request("GET", path)
        return connection.getresponse()

    for path in ("/", "/config", "/nothing-here"):
        headers = get(path).headers
        assert "default-src 'self'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
    for path in ("/openapi.json", "/docs", "/monitoring", "/gradio_api/runs"):
        assert get(path).status in (403, 404), path
    for path in ("/etc/passwd", __file__, str(Path(chat.__file__))):
        assert get(f"/gradio_api/file={path}").status == 403
    info = json.loads(get("/gradio_api/info").read())
    assert sorted(info["named_endpoints"]) == ["/chat", "/checkpoints"]


def test_another_address_or_a_public_link_needs_a_good_password(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(chat.PASSWORD, raising=False)
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    assert chat.find_password("127.0.0.1", share=False) is None
    for host, share in (("0.0.0.0", False), ("127.0.0.1", True)):
        with pytest.raises(ValueError, match="needs a password: set RLHF_KIT_APP_PASSWORD"):
            chat.find_password(host, share)
    monkeypatch.setenv(chat.PASSWORD, "seven77")
    with pytest.raises(ValueError, match="7 characters; take 8 or more"):
        chat.find_password("0.0.0.0", share=False)
    monkeypatch.setenv(chat.PASSWORD, "eight888")
    assert chat.find_password("0.0.0.0", share=False) == "eight888"
    check = chat.password_check("pässwörd")
    assert check("anybody", "pässwörd") and not check("anybody", "passwords")
