"""What the tabs share: words that change with the language, settings, the session of a request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import gradio as gr

from apps.checkpoints import Checkpoint
from apps.refusals import refusal
from apps.text import label_of, say
from apps.workbench import Workbench

Kind = TypeVar("Kind")

QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
"""How every event of the page is set up: no overlay over what changes, no place in the API."""
STREAM: dict[str, Any] = {
    **QUIET,
    "concurrency_limit": 16,
    "concurrency_id": "answers",
    "trigger_mode": "once",
}
"""An event that answers: so many may be open at once, taking turns on the device."""


@dataclass
class Labels:
    """The components whose words change with the language."""

    language: str
    items: list[tuple[Any, dict[str, str]]] = field(default_factory=list)

    def __call__(self, component: Kind, **keys: str) -> Kind:
        """Give each named property of `component` the words of its key, now and from now on."""
        for name, key in keys.items():
            setattr(component, name, say(self.language, key))
        self.items.append((component, keys))
        return component

    @property
    def components(self) -> list[Any]:
        return [component for component, _ in self.items]

    def updates(self, language: str) -> list[Any]:
        """One update a component, in the order of `components`."""
        changes: list[dict[str, Any]] = [
            {name: say(language, key) for name, key in keys.items()} for _, keys in self.items
        ]
        return [gr.update(**change) for change in changes]


@dataclass(frozen=True)
class Page:
    """What every tab is built on."""

    bench: Workbench
    labels: Labels
    language: gr.Radio
    browser: gr.BrowserState
    """{"key": the history's key, "language": the chosen language or None}."""
    announcement: gr.HTML
    """Read aloud when it changes."""


@dataclass(frozen=True)
class Settings:
    """How answers are sampled, as components."""

    system: gr.Textbox
    temperature: gr.Slider
    top_p: gr.Slider
    length: gr.Slider
    seed: gr.Number

    @property
    def components(self) -> list[Any]:
        return [self.system, self.temperature, self.top_p, self.length, self.seed]


def settings_panel(page: Page) -> Settings:
    limits, labels = page.bench.limits, page.labels
    return Settings(
        system=labels(
            gr.Textbox("", lines=2, max_lines=6, max_length=limits.message_characters),
            label="system",
            info="system_hint",
        ),
        temperature=labels(
            gr.Slider(0, limits.temperature, value=0.7, step=0.05),
            label="temperature",
            info="temperature_hint",
        ),
        top_p=labels(
            gr.Slider(limits.top_p, 1, value=0.9, step=0.01), label="top_p", info="top_p_hint"
        ),
        length=labels(gr.Slider(1, limits.new_tokens, value=256, step=1), label="length"),
        seed=labels(
            gr.Number(value=0, precision=0, minimum=0, maximum=limits.seed),
            label="seed",
            info="seed_hint",
        ),
    )


def sampling(values: Sequence[Any]) -> dict[str, Any]:
    """The settings' values as the engine room names them; it checks them."""
    names = ("system", "temperature", "top_p", "max_new_tokens", "seed")
    return dict(zip(names, values, strict=True))


def choices(language: str, checkpoints: Sequence[Checkpoint]) -> list[tuple[str, str]]:
    """What a dropdown of checkpoints offers: those that are whole."""
    return [(label_of(language, c), c.id) for c in checkpoints if c.complete]


def session_of(request: gr.Request | None) -> str:
    """The page that asks; an answer belongs to it, and so does its vote."""
    return (request.session_hash if request else None) or "script"


def key_of(browser: Any) -> str:
    """The history's key that a browser keeps."""
    return str(browser.get("key") or "") if isinstance(browser, dict) else ""


def sentence(language: str, error: BaseException) -> str:
    """An error for people: one sentence in their language, no traceback."""
    return refusal(language, str(error).strip() or type(error).__name__)
