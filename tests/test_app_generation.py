"""Streams of answers: what they say, how they end, and who has the device meanwhile."""

from __future__ import annotations

import dataclasses
import gc
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from app_runs import ask, write_run

from apps import pool as pool_module
from apps.answers import Event
from apps.generation import Generation
from apps.limits import Limits
from apps.memory import OutOfMemory
from apps.votes import PairEvent
from apps.workbench import Workbench
from rlhf_kit.chat import load_model, load_session
from rlhf_kit.config import GenerationConfig
from rlhf_kit.hybrid_engine.decode import _Run

LONG = Limits(new_tokens=20_000, seconds=10_000, unread_seconds=10_000)
"""Answers that take many seconds: nothing but a stop ends them within a test."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("generation"))


@pytest.fixture
def open_bench(run: Path) -> Iterator[Callable[..., Workbench]]:
    opened: list[Workbench] = []

    def make(**keywords: Any) -> Workbench:
        opened.append(Workbench(run, **keywords))
        return opened[-1]

    yield make
    for bench in opened:
        bench.close()
        assert bench.generation.running() == 0 and bench.pool.loaded() == []


@pytest.fixture
def bench(open_bench: Callable[..., Workbench]) -> Workbench:
    return open_bench(limits=LONG)


def id_of(bench: Workbench, name: str = "final") -> str:
    return bench.checkpoints.named(name).id


def stream(bench: Workbench, text: str = "Why?", name: str = "final", **keywords: Any):
    settings = {"session": "s", "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 8, **keywords}
    return bench.generation.stream(id_of(bench, name), ask(text), **settings)


def endless(bench: Workbench, name: str = "final", **keywords: Any):
    """Greedy, so without EOS, and longer than any test."""
    return stream(bench, name=name, temperature=0, max_new_tokens=20_000, **keywords)


def compare_endlessly(bench: Workbench, **keywords: Any) -> Iterator[PairEvent]:
    pair = id_of(bench, "ema"), id_of(bench, "final")
    settings = {"session": "s", "temperature": 0, "max_new_tokens": 20_000, **keywords}
    return bench.arena.compare(*pair, ask(), **settings)


def last(events: Iterator[Event]) -> Event:
    return list(events)[-1]


def until_idle(bench: Workbench) -> None:
    """Wait for the threads of answers; they end by themselves."""
    deadline = time.monotonic() + 60
    while bench.generation.running():
        assert time.monotonic() < deadline, "an answer goes on"
        time.sleep(0.01)


# ---- what an answer says


def test_the_answer_is_that_of_the_terminal_chat(bench: Workbench, run: Path):
    generation = GenerationConfig(max_new_tokens=8, temperature=0.9, top_p=0.8, slots=1)
    session = load_session(run / "ppo/final", generation=generation, seed=5, system="be kind")
    for question in ("Why?", "And then?"):
        list(session.reply(question))
    _, first, _, second = (message["content"] for message in session.messages)

    settings: dict[str, Any] = {"temperature": 0.9, "top_p": 0.8, "seed": 5, "system": "be kind"}
    event = last(stream(bench, **settings))
    assert event.text == first and event.tokens == 8 and event.reason == "length"
    talk = [*ask(), {"role": "assistant", "content": first}, *ask("And then?")]
    events = bench.generation.stream(id_of(bench), talk, session="s", max_new_tokens=8, **settings)
    assert last(events).text == second


def test_a_retry_draws_another_answer_and_the_same_seed_the_same(bench: Workbench):
    texts = [last(stream(bench, seed=1, attempt=a)).text for a in (0, 1, 2, 1)]
    assert texts[1] == texts[3] and len(set(texts)) == 3


def test_events_grow_to_the_whole_answer_and_say_how_it_ended(bench: Workbench):
    events = list(stream(bench, max_new_tokens=300))
    assert [e.tokens for e in events] == sorted(e.tokens for e in events)
    assert {e.reason for e in events[:-1]} == {""} and events[-1].reason in ("end", "length")
    assert all(events[-1].text.startswith(e.text.strip()) for e in events)
    assert len({e.answer for e in events}) == 1 and events[-1].prompt_tokens > 0
    assert events[-1].first_token_seconds > 0 and events[-1].tokens_per_second > 0


def test_however_fast_a_model_is_its_events_are_at_most_so_many_a_second(bench: Workbench):
    begin = time.monotonic()
    events = list(stream(bench, temperature=0, max_new_tokens=1000))
    seconds = time.monotonic() - begin
    assert events[-1].tokens == 1000
    # beside them: the first while it waits, the first token and the end
    assert 3 <= len(events) <= 12 * seconds + 3


def test_old_turns_leave_when_the_context_is_full(bench: Workbench, monkeypatch):
    with bench.pool.actor(id_of(bench)) as lease:
        small = dataclasses.replace(lease.value, context=120)
    monkeypatch.setattr(pool_module, "load_model", lambda path: small)
    bench.pool.clear()
    talk = []
    for i in range(10):
        talk += [*ask(f"Name two rivers. {i}"), {"role": "assistant", "content": "No."}]
    talk += ask("Why?")
    settings: dict[str, Any] = {"max_new_tokens": 100}
    event = last(bench.generation.stream(id_of(bench), talk, session="s", **settings))
    assert event.dropped > 0 and event.dropped % 2 == 0
    assert event.reason == "context" and event.prompt_tokens + event.tokens == 120
    prompt = bench.generation.prompt(id_of(bench), talk, **settings)
    assert prompt.dropped == event.dropped and len(prompt.ids) == event.prompt_tokens
    assert prompt.text.count("Human: ") == 11 - event.dropped // 2
    assert prompt.context == 120


def test_the_prompt_is_shown_as_the_template_writes_it(bench: Workbench):
    prompt = bench.generation.prompt(id_of(bench), ask("Say <eos>!"), system="be kind")
    assert prompt.text.endswith("Human: Say <eos>!\n\nAssistant:") and "be kind" in prompt.text
    assert "".join(prompt.tokens) == prompt.text and len(prompt.tokens) == len(prompt.ids)
    assert "<eos>" not in prompt.tokens[-20:], "a user's text is no special token"


# ---- how it ends


def test_stop_ends_an_answer_within_a_token(bench: Workbench):
    events = endless(bench)
    seen = next(event for event in events if event.tokens)
    assert bench.generation.stop("another session") == 0
    assert bench.generation.stop("s", "b") == 0
    assert bench.generation.stop("s") == 1
    rest = list(events)
    assert rest[-1].reason == "stopped" and seen.tokens <= rest[-1].tokens < 20_000
    assert rest[-1].text.startswith(seen.text.strip())
    until_idle(bench)
    assert last(stream(bench, "Still there?")).reason in ("end", "length")


def test_a_closed_page_frees_the_device(bench: Workbench):
    events = endless(bench)
    assert next(event for event in events if event.tokens)
    events.close()
    until_idle(bench)
    bench.pool.clear()
    assert bench.pool.loaded() == []


def test_an_answer_that_nobody_reads_ends(open_bench: Callable[..., Workbench]):
    bench = open_bench(limits=dataclasses.replace(LONG, unread_seconds=0.2))
    events = endless(bench)
    next(events)
    until_idle(bench)
    assert last(events).reason == "stopped"


def test_an_answer_has_a_time_limit(open_bench: Callable[..., Workbench]):
    bench = open_bench(limits=dataclasses.replace(LONG, seconds=0.1))
    assert last(endless(bench)).reason == "time"


def test_a_new_question_ends_the_answer_before_it(bench: Workbench):
    old = endless(bench)
    assert next(event for event in old if event.tokens)
    assert last(stream(bench)).reason in ("end", "length")
    assert last(old).reason == "stopped"


def test_answers_beyond_what_the_server_writes_at_once_are_refused(
    open_bench: Callable[..., Workbench],
):
    bench = open_bench(limits=dataclasses.replace(LONG, running=2))
    streams = [endless(bench, session=name) for name in "ab"]
    for events in streams:
        next(events)
    with pytest.raises(ValueError, match=r"^2 answers are being written already; try again in a"):
        next(stream(bench, session="c"))
    streams[0].close()
    streams[1].close()
    until_idle(bench)
    assert last(stream(bench, session="c")).tokens > 0


# ---- errors


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
    ],
)
@pytest.mark.parametrize("place", ["load", "decode"])
def test_running_out_of_memory_is_an_error_and_never_an_answer(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, error: Exception, place: str
):
    freed: list[bool] = []
    monkeypatch.setattr("apps.generation.free_memory", lambda: freed.append(True))

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    if place == "load":
        monkeypatch.setattr(pool_module, "load_model", fail)
    else:
        monkeypatch.setattr("rlhf_kit.hybrid_engine.decode._Run.step", fail)
    seen: list[Event] = []
    with pytest.raises(OutOfMemory, match=r"^memory ran out while final was in use; choose a sho"):
        seen.extend(stream(bench))
    assert not any("memory" in event.text or event.reason for event in seen)
    assert freed == [True]
    monkeypatch.undo()
    until_idle(bench)
    assert last(stream(bench)).tokens > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_without_memory_is_an_error_and_what_was_taken_is_free_again(bench: Workbench):
    assert last(stream(bench)).tokens > 0
    pool_module.free_memory()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_per_process_memory_fraction(1e-6)
    try:
        with pytest.raises(OutOfMemory, match="^memory ran out while final was in use"):
            list(endless(bench))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    until_idle(bench)
    assert torch.cuda.memory_allocated() == before
    assert last(stream(bench)).tokens > 0


def test_a_model_larger_than_the_memory_is_refused(open_bench: Callable[..., Workbench]):
    with pytest.raises(OutOfMemory, match=r"^final takes 0\.00 GB with room to work, but only 0"):
        list(stream(open_bench(memory=10)))


def test_a_mistake_inside_gives_a_sentence_to_the_reader_and_the_rest_to_the_log(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(Generation, "_decode", lambda *_: {}["secret detail"])
    with pytest.raises(ValueError) as error:
        list(stream(bench))
    assert str(error.value) == "the answer failed inside the server; its log says why"
    assert "secret detail" in capsys.readouterr().err


def test_weights_that_are_not_finite_are_said_to_be(bench: Workbench):
    with bench.pool.actor(id_of(bench)) as lease, torch.no_grad():
        lease.value.decoder.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="the model's logits are not finite"):
        list(stream(bench))


def test_a_checkpoint_that_was_written_anew_is_loaded_anew(run: Path, tmp_path: Path):
    bench = Workbench(shutil.copytree(run, tmp_path / "run"))
    old = last(stream(bench))
    final, ema = (bench.checkpoints.root / "ppo" / name for name in ("final", "ema"))
    other = last(stream(bench, name="ema")).text
    for file in ema.iterdir():
        shutil.copyfile(file, final / file.name)
    assert last(stream(bench)).text == other != old.text
    with pytest.raises(ValueError, match="final was written anew since this answer; ask again"):
        bench.scoring.scores(old.answer)
    assert sorted(bench.pool.loaded()) == ["EMA", "final"]
    bench.close()


# ---- two at once


def test_two_answers_advance_side_by_side_where_both_models_fit(bench: Workbench):
    events = compare_endlessly(bench)
    both = next(e for e in events if e.a.tokens > 5 and e.b.tokens > 5)
    assert not both.a.reason and not both.b.reason
    assert sorted(bench.pool.loaded()) == ["EMA", "final"]
    assert both.a.note == "loaded" and both.b.note == "loaded beside EMA"
    bench.generation.stop("s")
    end = list(events)[-1]
    assert end.a.reason == end.b.reason == "stopped"


def test_the_device_does_one_forward_pass_at_a_time_and_both_answers_get_their_share(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
):
    inside: list[_Run] = []
    passes: list[tuple[_Run, int]] = []
    step = _Run.step

    def watched(run: _Run) -> None:
        inside.append(run)
        try:
            time.sleep(0)  # another thread's chance
            step(run)
        finally:
            passes.append((run, len(inside)))
            inside.remove(run)

    monkeypatch.setattr(_Run, "step", watched)
    events = compare_endlessly(bench)
    assert next(e for e in events if min(e.a.tokens, e.b.tokens) > 200)
    events.close()
    until_idle(bench)
    assert {most for _, most in passes} == {1}
    runs = [run for run, _ in passes]
    one, other = dict.fromkeys(runs)
    both = runs[runs.index(other) :][:200]
    # in turn: not half and half only where the machine held a thread up
    assert 60 <= both.count(one) <= 140


def test_turns_come_in_the_order_of_asking(bench: Workbench):
    order: list[int] = []

    def take(number: int) -> None:
        with bench.pool.turn():
            order.append(number)

    threads = [threading.Thread(target=take, args=(number,)) for number in range(4)]
    with bench.pool.turn():
        for number, thread in enumerate(threads):
            thread.start()
            while len(bench.pool._turns) < number + 2:
                time.sleep(0.001)
    take(4)
    for thread in threads:
        thread.join()
    assert order == [0, 1, 2, 3, 4]


def one_model(bench: Workbench) -> int:
    """Bytes that hold one model and not two."""
    return int(1.5 * bench.pool._size(bench.checkpoints.directory(id_of(bench))))


def test_models_that_do_not_fit_together_take_turns_and_say_so(
    open_bench: Callable[..., Workbench],
):
    bench = open_bench(memory=one_model(open_bench()))
    pair = id_of(bench, "ema"), id_of(bench, "final")
    events = list(bench.arena.compare(*pair, ask(), session="s", max_new_tokens=8))
    assert all(e.b.waiting for e in events if not e.a.reason)
    end = events[-1]
    assert end.a.tokens and end.b.tokens and end.errors == ("", "")
    assert end.a.note == "loaded" and end.b.note == "loaded instead of EMA"
    assert bench.pool.loaded() == ["final"]


@pytest.mark.parametrize(("small", "stay"), [(1 << 30, 5), (0, 4)])
def test_four_models_stay_in_memory_and_more_of_small_ones(
    open_bench: Callable[..., Workbench], monkeypatch: pytest.MonkeyPatch, small: int, stay: int
):
    monkeypatch.setattr(pool_module, "SMALL", small)
    bench = open_bench()
    for name in ("base", "sft", "step-00000004", "final", "ema"):
        last(stream(bench, name=name))
    assert (
        bench.pool.loaded()[-stay:] == ["base (base)", "SFT", "PPO step 4", "final", "EMA"][-stay:]
    )
    assert len(bench.pool.loaded()) == stay


def test_a_model_that_is_let_go_is_freed_without_the_garbage_collector(run: Path):
    """Which leaves it out, once `keep_collections_short` was called."""
    loaded = load_model(run / "ppo/final")
    list(loaded.decoder.stream([1, 2], GenerationConfig(max_new_tokens=2, slots=1), seed=0))
    weights = [weakref.ref(weight) for weight in loaded.decoder.model.parameters()]
    gc.disable()
    try:
        del loaded
        assert weights and not any(weight() is not None for weight in weights)
    finally:
        gc.enable()


def test_once_warm_the_server_collects_garbage_among_what_came_since(
    open_bench: Callable[..., Workbench],
):
    try:
        open_bench().warm()
        deadline = time.monotonic() + 60
        while not gc.get_freeze_count():
            assert time.monotonic() < deadline, "nothing was left out"
            time.sleep(0.01)
        assert gc.get_freeze_count() > 100_000  # all that is imported
    finally:
        gc.unfreeze()


def test_many_users_of_more_models_than_fit_all_get_their_answers(
    open_bench: Callable[..., Workbench],
):
    bench = open_bench(memory=one_model(open_bench()))
    names = ["base", "sft", "final", "ema"]
    ends: list[PairEvent] = []

    def user(number: int) -> None:
        pair = id_of(bench, names[number % 4]), id_of(bench, names[(number + 1) % 4])
        talk = bench.arena.compare(*pair, ask(), session=f"s{number}", max_new_tokens=8)
        ends.append(list(talk)[-1])

    users = [threading.Thread(target=user, args=(number,)) for number in range(4)]
    for thread in users:
        thread.start()
    for thread in users:
        thread.join(120)
    assert len(ends) == 4 and all(e.a.tokens and e.b.tokens for e in ends)


def test_a_wait_for_memory_can_be_stopped_and_has_an_end(open_bench: Callable[..., Workbench]):
    limits = dataclasses.replace(LONG, wait_seconds=0.2)
    bench = open_bench(memory=one_model(open_bench()), limits=limits)
    events = compare_endlessly(bench)
    late = next(e for e in events if e.errors[1])
    assert late.errors[1].startswith("no memory became free for final within 0.2 s; try again")
    assert late.a.tokens and not late.a.reason
    events.close()
    until_idle(bench)

    bench.generation.limits = LONG
    events = compare_endlessly(bench)
    assert next(e for e in events if e.a.tokens).b.waiting
    bench.generation.stop("s", "b")
    assert next(e for e in events if e.b.reason).b.reason == "stopped"
    events.close()
