"""The real app over HTTP: what callers who bypass the page get, and what they do not."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio", reason="the app's extra is not installed")

import gradio as gr
import httpx
from app_runs import ask, write_run
from gradio_client import Client
from gradio_client.exceptions import AppError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apps import chat
from apps.limits import Limits
from apps.sessions import Sessions
from apps.workbench import Workbench

TRAVERSAL = "../../../../../../../../etc/passwd"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workbench]:
    run = write_run(tmp_path_factory.mktemp("api"))
    opened = Workbench(run, limits=Limits(new_tokens=20_000))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def server(bench: Workbench) -> Iterator[tuple[gr.Blocks, str]]:
    blocks, url = chat.start(bench, block=False)
    yield blocks, url.rstrip("/")
    blocks.close(verbose=False)


@pytest.fixture(scope="module")
def address(server: tuple[gr.Blocks, str]) -> str:
    return server[1]


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[Client]:
    opened = Client(address, verbose=False)
    yield opened
    opened.close()


def id_of(bench: Workbench, name: str = "final") -> str:
    return bench.checkpoints.named(name).id


def until_idle(bench: Workbench) -> None:
    deadline = time.monotonic() + 60
    while bench.generation.running():
        assert time.monotonic() < deadline, "an answer goes on"
        time.sleep(0.01)


def harmless(bench: Workbench, text: str) -> None:
    """No traceback, no place on this machine, no file's contents."""
    for secret in ("Traceback", 'File "', str(bench.checkpoints.root.parent), "root:x:"):
        assert secret not in text, text


def test_only_the_two_endpoints_for_scripts_are_named(client: Client):
    named = client.view_api(return_format="dict")["named_endpoints"]
    assert set(named) == {"/checkpoints", "/chat"}


def test_a_script_chats_as_the_page_does(bench: Workbench, client: Client):
    names = [c["name"] for c in client.predict(api_name="/checkpoints")]
    assert names == ["base", "sft", "step-00000004", "final", "ema"]
    job = client.submit(id_of(bench), ask(), "", 1.0, 1.0, 8, 0, api_name="/chat")
    events = list(job)
    assert events[-1]["tokens"] <= 8 and events[-1]["reason"] in ("end", "length")


def test_calls_leave_neither_statistics_nor_sessions_of_gradio_behind(
    server: tuple[gr.Blocks, str], client: Client
):
    blocks, address = server
    for _ in range(3):
        client.predict(api_name="/checkpoints")
    queue = blocks._queue
    assert queue.events_recorded >= 3 and len(queue.event_analytics) <= 1
    assert queue.cached_event_analytics_summary == {"functions": {}}, "no data frame was made"
    assert blocks.app.state_holder is blocks.state_holder
    assert isinstance(blocks.state_holder, Sessions)
    assert client.session_hash in blocks.state_holder.session_data
    assert httpx.get(f"{address}/monitoring", timeout=30).status_code == 403


GOOD: dict[str, Any] = {
    "checkpoint": "final",
    "messages": ask(),
    "system": "",
    "temperature": 0.7,
    "top_p": 0.9,
    "max_new_tokens": 4,
    "seed": 0,
}
LONG = [{"role": "assistant" if i % 2 else "user", "content": "x"} for i in range(10_001)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint": TRAVERSAL}, "this run has no checkpoint of that name"),
        ({"checkpoint": "/"}, "this run has no checkpoint of that name"),
        ({"checkpoint": None}, "this run has no checkpoint of that name"),
        ({"messages": ask("x" * 1_000_000)}, "a message may have 20,000 characters, not 1,000,000"),
        ({"messages": LONG}, "a dialogue may have 200 messages, not 10001"),
        ({"messages": TRAVERSAL}, "the messages must be a list"),
        ({"messages": [{"role": TRAVERSAL, "content": "x"}]}, "user and assistant in turn"),
        ({"messages": [{"role": "user", "content": {"path": TRAVERSAL}}]}, "must be text"),
        ({"messages": None}, "the messages must be a list"),
        ({"system": "x" * 20_001}, "the system prompt may have 20,000 characters"),
        ({"system": 5}, "the system prompt must be text"),
        ({"temperature": 99}, "the temperature must be a number from 0 to 2, not 99"),
        ({"temperature": TRAVERSAL}, "the temperature must be a number from 0 to 2"),
        ({"top_p": 0}, "top-p must be a number from 0.01 to 1"),
        ({"max_new_tokens": 10**9}, "the length must be a whole number from 1 to"),
        ({"seed": -1}, "the seed must be a whole number"),
        ({"seed": TRAVERSAL}, "the seed must be a whole number"),
    ],
)
def test_a_call_past_the_limits_is_refused_in_one_sentence(
    bench: Workbench, client: Client, changes: dict[str, Any], message: str
):
    with pytest.raises(AppError) as error:
        client.predict(*{**GOOD, **changes}.values(), api_name="/chat")
    text = str(error.value)
    assert message in text and "\n" not in text and len(text) < 300
    harmless(bench, text)
    assert bench.generation.running() == 0


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "path", "meta", "x"]), inner)
    ),
    max_leaves=6,
)


@given(changes=st.dictionaries(st.sampled_from(sorted(GOOD)), ANYTHING, min_size=1, max_size=3))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_call_is_answered_or_refused_in_one_sentence(
    bench: Workbench, client: Client, changes: dict[str, Any]
):
    try:
        event = client.predict(*{**GOOD, **changes}.values(), api_name="/chat")
        assert event["reason"] in ("end", "length")
    except AppError as error:
        assert "\n" not in str(error) and len(str(error)) < 400
        harmless(bench, str(error))
    assert bench.generation.running() == 0


def test_html_and_script_come_through_as_text(bench: Workbench, client: Client):
    text = "<script>alert(1)</script><img src=http://example.com/x.png>"
    event = client.predict(*{**GOOD, "messages": ask(text)}.values(), api_name="/chat")
    prompt = bench.generation.answer(event["answer"]).dialogue[-1]["content"]
    assert prompt == text


def spoil_config(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "x.Y"}}))


def spoil_weights(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def spoil_place(path: Path) -> None:
    outside = path.parents[3] / "outside"
    shutil.move(path, outside)
    path.symlink_to(outside)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_config, "has auto_map, which names Python code to import"),
        (spoil_weights, "pickled weights are refused"),
        (spoil_place, "is a link that leaves the run directory: it is not loaded"),
    ],
)
def test_a_checkpoint_that_is_not_to_be_trusted_is_refused(
    bench: Workbench, client: Client, spoil: Any, message: str
):
    exports = bench.checkpoints.root / "ppo/exports"
    bad = exports / "step-00000099"
    shutil.copytree(exports / "step-00000004", bad)
    spoil(bad)
    try:
        with pytest.raises(AppError) as error:
            client.predict(*{**GOOD, "checkpoint": bad.name}.values(), api_name="/chat")
        assert message in str(error.value)
        harmless(bench, str(error.value))
    finally:
        bad.unlink() if bad.is_symlink() else shutil.rmtree(bad)
        shutil.rmtree(exports.parents[2] / "outside", ignore_errors=True)


def test_a_caller_who_hangs_up_frees_the_device(bench: Workbench, address: str):
    data = list({**GOOD, "temperature": 0, "max_new_tokens": 20_000}.values())
    call = httpx.post(f"{address}/gradio_api/call/chat", json={"data": data}).json()
    stream = f"{address}/gradio_api/call/chat/{call['event_id']}"
    with httpx.stream("GET", stream, timeout=60) as response:
        for line in response.iter_lines():
            if '"tokens": ' in line and '"tokens": 0' not in line:
                break
        assert bench.generation.running() == 1
    until_idle(bench)


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        TRAVERSAL,
        "{root}/run.json",
        "{root}/votes.jsonl",
        "{root}/sft/final/config.json",
        "{app}/chat.py",
        "http://127.0.0.1:22/",
    ],
)
def test_no_file_of_the_machine_is_served(bench: Workbench, address: str, path: str):
    bench.arena.path.touch()
    path = path.format(root=bench.checkpoints.root, app=Path(chat.__file__).parent)
    for route in ("/gradio_api/file=", "/file=", "/gradio_api/file/", "/static/", "/theme.css/../"):
        response = httpx.get(f"{address}{route}{path}", timeout=30)
        assert response.status_code in (400, 403, 404, 405), (route, response.status_code)
        assert not any(word in response.text for word in ("root:x:", "model_type", "Workbench"))


def test_an_upload_is_refused_beyond_a_kilobyte(address: str):
    files = {"files": ("../../x.html", b"<script>" * 1000)}
    response = httpx.post(f"{address}/gradio_api/upload", files=files, timeout=30)
    assert response.status_code == 413


def test_every_response_names_what_a_page_may_load(address: str):
    headers = httpx.get(address, timeout=30).headers
    assert "default-src" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize("value", [TRAVERSAL, 10**9, {"path": TRAVERSAL}])
def test_no_handler_of_the_page_takes_a_path(bench: Workbench, address: str, value: Any):
    """Every event of the page, called past the page with the same wrong value in every field."""
    config = httpx.get(f"{address}/config", timeout=30).json()
    called = 0
    with httpx.Client(base_url=f"{address}/gradio_api", timeout=60) as http:
        for dependency in config["dependencies"]:
            if not dependency["backend_fn"]:
                continue
            session = f"fuzz{dependency['id']}"
            body = {
                "data": [value] * len(dependency["inputs"]),
                "fn_index": dependency["id"],
                "session_hash": session,
            }
            joined = http.post("/queue/join", json=body)
            harmless(bench, joined.text)
            if joined.status_code != 200:
                continue
            called += 1
            with http.stream("GET", f"/queue/data?session_hash={session}") as response:
                for line in response.iter_lines():
                    harmless(bench, line)
                    if '"process_completed"' in line or '"close_stream"' in line:
                        break
    assert called > 10
    until_idle(bench)
    assert httpx.get(address, timeout=30).status_code == 200
