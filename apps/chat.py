"""The app in the browser: chat with a run's checkpoints, compare them blindly, see the run.

    rlhf-kit app RUN_DIR

It answers on this machine alone. Another address or a public link needs its flag and a
password; nothing is sent anywhere, and the browser is told to ask no other host for anything.
"""

from __future__ import annotations

import getpass
import hmac
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from apps import api, chat_actions, chat_tab, compare_actions, compare_tab, progress_tab, sessions
from apps.markup import transcript
from apps.memory import give_back_freed_memory
from apps.page import QUIET, Labels, Page, choices, key_of
from apps.text import LANGUAGES, preferred, say
from apps.theme import POLICY, STYLE, head, theme
from apps.workbench import Workbench
from rlhf_kit.config import require

HERE = "127.0.0.1"
LOOPBACK = (HERE, "localhost", "::1")
PASSWORD = "RLHF_KIT_APP_PASSWORD"
"""The environment variable that holds the password, where one is needed."""
SHORTEST = 8
"""Characters of a password, at least: Gradio does not slow down who guesses."""
WAITING = 64
"""Events that may wait; the next one is told that the queue is full."""
NO_STATISTICS = {
    "GRADIO_ANALYTICS_MAX_EVENTS": "1",
    "GRADIO_ANALYTICS_CACHE_FREQUENCY": str(10**9),
}
"""Gradio would remember the last 10,000 calls, monitoring or not, and make a data frame of them
all after each: tens of megabytes of Arrow's memory, and ever more time."""
HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)


class SafeHeaders:
    """Adds HEADERS to every response."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *HEADERS]
            await send(message)

        await self.app(scope, receive, send_with)


# ---- the page


@dataclass(frozen=True)
class Tabs:
    """The tabs with their handlers."""

    tabs: gr.Tabs
    chat: chat_tab.ChatTab
    chat_do: chat_actions.ChatActions
    compare: compare_tab.CompareTab
    compare_do: compare_actions.CompareActions
    progress: progress_tab.ProgressTab
    progress_do: progress_tab.ProgressActions


def build(bench: Workbench, *, language: str | None = None) -> gr.Blocks:
    """The page. language: what it speaks where a browser has not chosen; None: the browser's."""
    labels = Labels(language or "en")
    with gr.Blocks(title="rlhf_kit", analytics_enabled=False, fill_width=True) as blocks:
        with gr.Row(elem_id="top"):
            gr.HTML(
                f"<h1>rlhf_kit</h1><p>{escape(bench.checkpoints.root.name)}</p>",
                elem_id="title",
                apply_default_css=False,
                js_on_load=None,
            )
            chosen = labels(
                gr.Radio(list(LANGUAGES), value=labels.language, elem_id="language", min_width=170),
                label="language",
            )
            labels(gr.Button(size="sm", elem_id="theme", min_width=90), value="theme")
        announcement = gr.HTML("", elem_id="announcement", apply_default_css=False, js_on_load=None)
        browser = gr.BrowserState(None, storage_key="rlhf-kit", secret="rlhf-kit")
        page = Page(bench, labels, chosen, browser, announcement)
        with gr.Tabs(elem_id="tabs") as tabs:
            with labels(gr.Tab(id="chat"), label="chat"):
                chat = chat_tab.build(page)
            with labels(gr.Tab(id="compare", elem_id="compare-tab"), label="compare"):
                compare = compare_tab.build(page)
            with labels(gr.Tab(id="progress"), label="progress") as progress_item:
                progress = progress_tab.build(page)
        parts = Tabs(
            tabs,
            chat,
            chat_actions.wire(page, chat),
            compare,
            compare_actions.wire(page, compare, chat.talk),
            progress,
            progress_tab.wire(page, progress),
        )
        progress_item.select(
            parts.progress_do.read, chosen, [progress.charts, progress.status], **QUIET
        )
        wire(blocks, page, parts, language)
        api.add(bench)
    return blocks


def wire(blocks: gr.Blocks, page: Page, parts: Tabs, language: str | None) -> None:
    """What happens when the page opens, and when its language changes."""
    bench, chat, compare = page.bench, parts.chat, parts.compare
    lists = (chat.checkpoint, compare.first, compare.second)

    def still(spoken: str, talk: Any, models: Sequence[str], seed: Any) -> dict[Any, Any]:
        """All that does not move, in a language."""
        offered = choices(spoken, bench.checkpoints.list())
        words = dict(zip(page.labels.components, page.labels.updates(spoken), strict=True))
        return {
            **words,
            **{
                part: {**words[part], **gr.update(choices=offered, value=model)}
                for part, model in zip(lists, models, strict=True)
            },
            chat.transcript: transcript(spoken, talk["messages"]),
            **parts.compare_do.chosen(models[1], models[2], seed, spoken),
        }

    def opened(request: gr.Request, browser: Any) -> dict[Any, Any]:
        """Find the browser's conversation and language, and obey ?a=ema&b=final&seed=0."""
        query = dict(request.query_params)
        chosen = browser.get("language") if isinstance(browser, dict) else None
        spoken = str(query.get("language") or chosen or language)
        if spoken not in dict(LANGUAGES).values():
            spoken = preferred(request.headers.get("accept-language", ""))
        talk, checkpoint = parts.chat_do.restore(browser)
        pair = [model.id for model in bench.checkpoints.default_pair()]
        seed, problem = 0, ""
        try:
            for place, name in enumerate("ab"):
                if name in query:
                    pair[place] = bench.checkpoints.named(query[name]).id
            seed = min(max(int(query.get("seed", "0")), 0), bench.limits.seed)
        except ValueError:
            problem = say(spoken, "bad_link")
        models = [checkpoint or bench.checkpoints.default().id, *pair]
        words = still(spoken, talk, models, seed)
        return {
            **words,
            page.language: {**words[page.language], "value": spoken},
            page.browser: {"key": key_of(browser) or bench.history.new_key(), "language": chosen},
            chat.talk: talk,
            compare.settings.seed: {**words[compare.settings.seed], "value": seed},
            **(parts.compare_do.remark(problem, "error") if problem else {}),
            **({parts.tabs: gr.update(selected="compare")} if {"a", "b"} & query.keys() else {}),
        }

    def speak(browser: Any, spoken: str, talk: Any, seed: Any, *models: str) -> dict[Any, Any]:
        """Change the language, and remember it."""
        return {
            **still(spoken, talk, models, seed),
            page.browser: {"key": key_of(browser), "language": spoken},
        }

    moved = [*page.labels.components, chat.transcript, compare.link, compare.tally, page.browser]
    more = [parts.tabs, page.announcement, chat.talk, compare.status]
    tell_browser = "(language) => rlhfKit.speak(language)"
    blocks.load(opened, page.browser, [*moved, *more], **QUIET).then(
        None, page.language, None, js=tell_browser, **QUIET
    )
    page.language.input(
        speak,
        [page.browser, page.language, chat.talk, compare.settings.seed, *lists],
        moved,
        **QUIET,
    ).then(None, page.language, None, js=tell_browser, **QUIET)


# ---- the server


def start(
    bench: Workbench,
    *,
    host: str = HERE,
    port: int | None = None,
    share: bool = False,
    password: str | None = None,
    language: str | None = None,
    block: bool = True,
) -> tuple[gr.Blocks, str]:
    """Serve the page; without `block`, return it with its address at once."""
    blocks = build(bench, language=language)
    os.environ.update(NO_STATISTICS)  # read by the queue as it is made
    blocks.queue(max_size=WAITING, default_concurrency_limit=8, api_open=False)
    app, address, public = blocks.launch(
        server_name=host,
        server_port=port,
        share=share,
        auth=password_check(password) if password else None,
        auth_message=say(language or "en", "password") if password else None,
        prevent_thread_lock=True,
        quiet=True,
        show_error=False,
        inline=False,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        allowed_paths=[],
        max_file_size="1kb",
        pwa=False,
        mcp_server=False,
        ssr_mode=False,
        app_kwargs={
            "middleware": [Middleware(SafeHeaders)],
            "openapi_url": None,
            "docs_url": None,
            "redoc_url": None,
        },
        theme=theme(),
        css_paths=STYLE,
        head=head(),
    )
    sessions.hold(app, blocks)
    print(f"The app is at {address} (Ctrl-C ends it).", flush=True)
    if public:
        print(f"Anybody with the password reaches it at {public}.", flush=True)
    if block:
        blocks.block_thread()
    return blocks, address


def password_check(password: str) -> Callable[[str, str], bool]:
    """Any name goes; the password is compared in constant time."""
    return lambda _, given: hmac.compare_digest(given.encode(), password.encode())


def find_password(host: str, share: bool) -> str | None:
    """The password where the app is reached from elsewhere, else None; ValueError without one."""
    if host in LOOPBACK and not share:
        return None
    password = os.environ.get(PASSWORD)
    if password is None and sys.stdin.isatty():
        password = getpass.getpass("Password for those who open the app: ")
    require(
        bool(password),
        f"with --share or another --host the app needs a password: set {PASSWORD}",
    )
    assert password is not None
    require(
        len(password) >= SHORTEST,
        f"the app's password has {len(password)} characters; take {SHORTEST} or more",
    )
    return password


def main(
    run_dir: str | Path,
    *,
    host: str = HERE,
    port: int | None = None,
    share: bool = False,
    password: str | None = None,
    language: str | None = None,
) -> int:
    """Serve `run_dir` until Ctrl-C; the exit code. ValueError with one sentence."""
    require(language is None or language in ("en", "zh"), "--language is en or zh")
    password = password or find_password(host, share)
    give_back_freed_memory()
    bench = Workbench(run_dir)
    bench.warm()
    if password:
        where = "a public link" if share else f"the address {host}"
        print(
            f"warning: {where} lets others use this machine's models and read their own "
            "conversations; votes of all are kept together",
            file=sys.stderr,
        )
    try:
        start(bench, host=host, port=port, share=share, password=password, language=language)
    except OSError as error:
        raise ValueError(f"the app cannot be served: {error}") from error
    finally:
        bench.close()
    return 0
