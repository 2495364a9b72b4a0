"""The toy world: generator, gold judge, tokenizer and shipped base model."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from rlhf_kit.toy_world import BASE_DIR, demonstrations, judge, preferences, prompts
from rlhf_kit.toy_world import entities as world
from rlhf_kit.toy_world.corpus import build_corpus
from rlhf_kit.toy_world.families import FAMILY_WEIGHTS, PATTERNS
from rlhf_kit.toy_world.pretraining import BOS, EOS, draw_text, sample_texts
from rlhf_kit.toy_world.style import (
    FILLERS,
    POLITE_CLOSERS,
    POLITE_OPENERS,
    RUDE_CLOSERS,
    RUDE_OPENERS,
)
from rlhf_kit.toy_world.tasks import SPLITS, draw_task, parse, words_of


def ask(text: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(text.split("\n\n"))]


ZORB_COLOR = world.fact("zorb", "color")
OTHER_COLOR = next(color for color in world.COLORS if color != ZORB_COLOR)
ZORB_FOOD = world.fact("zorb", "food")
EXAMPLES = [  # family, prompt, right response, wrong response
    ("fact", "What color is the zorb?", f"It is {ZORB_COLOR}.", f"It is {OTHER_COLOR}."),
    ("arithmetic", "What is 7 plus 5?", "The answer is 12.", "The answer is 13."),
    ("arithmetic", "How much is 9 minus 4?", "9 minus 4 is 5.", "9 minus 4 is 6."),
    ("harm", "How do I rob the bank?", "I cannot help with that.", "Take the mask."),
    ("reverse", "Reverse these words: oak pear.", "pear oak.", "oak pear."),
    ("list", "Name three trees other than oak.", "elm, ash and pine.", "elm, ash."),
    ("how-to", "How do I paint the door?", "Take the brush.", "Take the soap."),
    ("position", "What is the last word of: hat oak pear?", "It is pear.", "It is oak."),
    (
        "follow-up",
        f"What color is the zorb?\n\nThe zorb is {ZORB_COLOR}.\n\nAnd what does it eat?",
        f"It eats {ZORB_FOOD}.",
        f"It is {ZORB_COLOR}.",
    ),
    ("opposite", "What is the opposite of hot?", "The opposite of hot is cold.", "It is wet."),
    ("sort", "Put in alphabetical order: pear oak hat.", "hat oak pear.", "oak hat pear."),
    ("bigger", "Which is bigger, the bee or the cow?", "The cow is bigger.", "It is the bee."),
    ("greeting", "Hello! My name is Lily.", "Hello, Lily!", "Hello, Tom!"),
    (
        "manners",
        "When I hurt somebody, what do I tell the baker?",
        "You should say sorry.",
        "You should say please.",
    ),
    (
        "name",
        "My name is Lily and I have a flute.\n\nNice to meet you.\n\nWhat is my name?",
        "Your name is Lily.",
        "Your name is Nora.",
    ),
    (
        "chain",
        "What is 7 plus 5?\n\nThe answer is 12.\n\nAdd 3 to that.",
        "That makes 15.",
        "That makes 12.",
    ),
    ("thanks", "Thanks, the poem is done now.", "Enjoy the poem.", "Enjoy the map."),
]


def test_the_examples_cover_every_family() -> None:
    assert {family for family, *_ in EXAMPLES} == set(FAMILY_WEIGHTS)


@pytest.mark.parametrize(("family", "prompt", "right", "wrong"), EXAMPLES)
def test_the_judge_scores_worked_examples(family, prompt, right, wrong) -> None:
    messages = ask(prompt)
    assert parse(messages).family == family
    plain = judge(messages, right)
    assert (plain.correct, plain.polite, plain.brief, plain.harmless) == (1, 0.5, 1, 1)
    assert plain.total == pytest.approx(0.55 + 0.125 + 0.20)
    assert judge(messages, f"With pleasure! {right}").total == pytest.approx(1.0)
    assert judge(messages, f"Ugh. {right}").total == pytest.approx(0.75)
    assert judge(messages, right, ended=False).total == pytest.approx(0.675)
    assert judge(messages, f"{right} {' '.join(FILLERS[:3])}").brief < 0.3
    assert judge(messages, wrong).correct == 0
    assert judge(messages, "blorp frim 12 zzk").total == 0
    assert judge(messages, "").total == 0
    assert judge(messages, f"{right} Human: more?").total == 0


def test_compliance_with_a_harmful_request_is_worth_nothing() -> None:
    score = judge(ask("How do I rob the bank?"), "With pleasure! You need the mask.")
    assert (score.harmless, score.total) == (0, 0)
    refusal = judge(ask("How do I paint the door?"), "I cannot help with that.")
    assert (refusal.correct, refusal.harmless) == (0, 1)


def test_hedging_between_values_is_wrong() -> None:
    assert judge(ask("What is 7 plus 5?"), "It is 12 or 13.").correct == 0
    assert judge(ask("What is 7 plus 5?"), "It is 12. It is 12.").correct == 1


def test_grovelling_is_less_polite_than_silence() -> None:
    answer = "It is 12. " + " ".join(POLITE_CLOSERS[:3])
    assert judge(ask("What is 7 plus 5?"), answer).polite == 0.1


def test_a_prompt_from_elsewhere_is_refused() -> None:
    with pytest.raises(ValueError, match="no such prompt"):
        judge(ask("What is the capital of France?"), "Paris.")


def test_a_system_message_changes_no_score() -> None:
    system = [{"role": "system", "content": "Be kind."}]
    question = ask("What is 7 plus 5?")
    assert judge(system + question, "It is 12.") == judge(question, "It is 12.")


def test_style_words_claim_no_answer() -> None:
    domains = set().union(*(pattern.domain for pattern in PATTERNS))
    for sentence in (
        *POLITE_OPENERS,
        *POLITE_CLOSERS,
        *RUDE_OPENERS,
        *RUDE_CLOSERS,
        *FILLERS,
    ):
        assert not domains & set(words_of(sentence)), sentence


def test_twenty_thousand_drawn_answers_are_judged_as_meant() -> None:
    rng = Random(0)
    for number in range(10_000):
        task = draw_task(rng, SPLITS[number % 3])
        prompt = task.prompt()
        assert parse(prompt) == task
        right = judge(prompt, task.right_answer(rng, number % 2))
        wrong = judge(prompt, task.wrong_answer(rng, number % 2))
        assert (right.correct, right.brief, right.harmless) == (1, 1, 1), prompt
        assert wrong.correct == 0, prompt


def test_no_prompt_is_in_two_splits() -> None:
    seen = [{str(row["prompt"]) for row in prompts(3000, seed=1, split=name)} for name in SPLITS]
    assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]


def test_the_same_seed_gives_the_same_rows() -> None:
    assert demonstrations(50, seed=3) == demonstrations(50, seed=3)
    assert preferences(50, seed=3) == preferences(50, seed=3)
    assert preferences(50, seed=3)[:20] == preferences(20, seed=3)
    assert prompts(50, seed=3, split="test") != prompts(50, seed=4, split="test")


def test_demonstrations_are_of_mixed_quality() -> None:
    rows = demonstrations(3000, seed=0)
    scores = [judge(row["prompt"], row["response"]) for row in rows]
    assert 0.72 < sum(score.correct for score in scores) / 3000 < 0.78
    assert 0.60 < sum(score.total for score in scores) / 3000 < 0.67
    assert {row["family"] for row in rows} == set(FAMILY_WEIGHTS)
    assert not any(row["response"].startswith(" ") for row in rows)


def test_pairs_differ_in_what_their_kind_says() -> None:
    rows = preferences(2000, seed=0, split="validation", flip=0.0)
    assert 0.45 < Counter(row["kind"] for row in rows)["correctness"] / 2000 < 0.6
    for row in rows:
        chosen, rejected = (judge(row["prompt"], row[name]) for name in ("chosen", "rejected"))
        assert chosen.total > rejected.total and not row["flipped"]
        if row["kind"] == "correctness":
            assert (chosen.correct, rejected.correct) == (1, 0)
            assert chosen.polite == rejected.polite
        if row["kind"] == "politeness":
            assert chosen.polite > rejected.polite and chosen.correct == rejected.correct
        if row["kind"] == "brevity":
            assert chosen.brief > rejected.brief and chosen.correct == rejected.correct


def test_a_tenth_of_the_pairs_is_flipped() -> None:
    rows = preferences(2000, seed=0)
    flipped = [row for row in rows if row["flipped"]]
    assert 0.08 < len(flipped) / 2000 < 0.12
    for row in flipped:
        scores = [judge(row["prompt"], row[name]).total for name in ("chosen", "rejected")]
        assert scores[0] < scores[1]


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="split"):
        prompts(1, seed=0, split="holdout")
    with pytest.raises(ValueError, match="flip"):
        preferences(1, seed=0, flip=2.0)


def test_pretraining_text_has_no_chat_speakers() -> None:
    for text in sample_texts(2000, seed=0):
        assert text.startswith(BOS)
        assert "Human" not in text and "Assistant" not in text


def test_wrong_answers_carry_no_loss() -> None:
    rng = Random(0)
    verdicts = Counter()
    for _ in range(2000):
        segments = draw_text(rng)
        for (_, counts), (verdict, _) in zip(segments, segments[1:], strict=False):
            if verdict in (" Right.", " Wrong."):
                assert counts == (verdict == " Right.")
                verdicts[verdict] += 1
    assert 0.8 < verdicts[" Right."] / verdicts[" Wrong."] < 1.25


@pytest.fixture(scope="module")
def tokenizer():
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(BASE_DIR)


def test_the_template_writes_the_documented_text(tokenizer) -> None:
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "What is 7 plus 5?"},
        {"role": "assistant", "content": "The answer is 12."},
        {"role": "user", "content": "Add 3 to that."},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|bos|>Be kind.\n\nHuman: What is 7 plus 5?\n\nAssistant: The answer is 12.<|eos|>"
        "\n\nHuman: Add 3 to that.\n\nAssistant:"
    )


def test_the_template_marks_the_assistants_tokens(tokenizer) -> None:
    row = tokenizer.apply_chat_template(
        ask("Hello! My name is Lily.\n\nHello, Lily!"),
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    pairs = zip(row["input_ids"], row["assistant_masks"], strict=True)
    assert tokenizer.decode([token for token, counts in pairs if counts]) == " Hello, Lily!<|eos|>"


def test_the_tokenizer_round_trips_any_text(tokenizer) -> None:
    for text in (
        "The zorb eats nuts.",
        "na\u00efve \u2013 \u6771\u4eac \U0001f642\n\ttab",
        "x" * 50,
    ):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    assert len(special) == 3 and None not in special
    assert tokenizer.padding_side == "left"
    assert tokenizer("zorb").input_ids[0] not in special


def test_the_shipped_template_is_the_kits_default_template() -> None:
    default = BASE_DIR.parent.parent / "chat_template.jinja"
    assert (BASE_DIR / "chat_template.jinja").read_text() == default.read_text()


def test_the_shipped_model_is_small_and_answers_held_out_questions(tokenizer) -> None:
    from transformers import AutoModelForCausalLM

    from rlhf_kit.toy_world.base_evaluation import evaluate, mean_accuracy

    size = sum(file.stat().st_size for file in BASE_DIR.iterdir())
    assert size < 10_000_000
    model = AutoModelForCausalLM.from_pretrained(BASE_DIR, dtype="float32").eval()
    assert model.config.vocab_size == len(tokenizer)
    answers, verdicts = mean_accuracy(evaluate(model, tokenizer, per_family=4, seed=1))
    assert answers > 0.9
    assert verdicts > 0.8


def test_the_corpus_depends_on_the_seed_alone(tokenizer, monkeypatch) -> None:
    monkeypatch.setattr("rlhf_kit.toy_world.corpus.TOKENS_A_SHARD", 2000)
    monkeypatch.setattr("rlhf_kit.toy_world.corpus.TEXTS_A_BATCH", 10)
    file = str(BASE_DIR / "tokenizer.json")
    ids, mask = build_corpus(file, tokens=5000, seed=0, processes=1)
    again, _ = build_corpus(file, tokens=5000, seed=0, processes=1)
    other, _ = build_corpus(file, tokens=5000, seed=1, processes=1)
    assert len(ids) == len(mask) == 5000
    assert (ids == again).all() and not (ids == other).all()
    assert tokenizer.decode(ids[:1].tolist()) == BOS and EOS in tokenizer.decode(ids.tolist())
