"""The app's HTTP API: two named endpoints for scripts, under the same limits as the page."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import gradio as gr
from gradio.events import api as endpoint

from apps.page import session_of
from apps.workbench import Workbench


def add(bench: Workbench) -> None:
    """Add the endpoints to the Blocks that are being built."""

    def checkpoints() -> list[dict[str, Any]]:
        """The checkpoints that may be chosen."""
        return [asdict(checkpoint) for checkpoint in bench.checkpoints.list()]

    def chat(
        request: gr.Request,
        checkpoint: str,
        messages: list[dict[str, str]],
        system: str = "",
        temperature: float = 0.7,
        top_p: float = 0.9,
        max_new_tokens: int = 256,
        seed: int = 0,
    ) -> Iterator[dict[str, Any]]:
        """Stream a checkpoint's answer (its id or name) to a dialogue of roles and contents."""
        try:
            try:
                model = bench.checkpoints.get(checkpoint)
            except ValueError:
                model = bench.checkpoints.named(checkpoint)
            events = bench.generation.stream(
                model.id,
                messages,
                session=session_of(request),
                pane="api",
                system=system,
                temperature=temperature,
                top_p=top_p,
                max_new_tokens=max_new_tokens,
                seed=seed,
            )
            with contextlib.closing(events):
                for event in events:
                    yield asdict(event)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from None

    endpoint(checkpoints, api_name="checkpoints")
    endpoint(chat, api_name="chat", concurrency_limit=16, concurrency_id="answers")
