"""What a base model of the toy world knows: its answers and its verdicts on held-out tasks.

Shapes: B batch, P prompt, T = P + R, V vocabulary.
"""

from __future__ import annotations

from random import Random

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_kit.toy_world.dialogues import draw_style
from rlhf_kit.toy_world.families import FAMILY_WEIGHTS
from rlhf_kit.toy_world.judge import judge
from rlhf_kit.toy_world.pretraining import BOS, EOS, FORUM, RIGHT, WRONG, exchange_prompt
from rlhf_kit.toy_world.tasks import Task, draw_task

MAX_NEW_TOKENS = 48


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    split: str = "test",
    per_family: int = 100,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Accuracy per family: of the greedy answers, and of the verdicts right / wrong.

    An answer is right when the gold judge finds it correct. A verdict is right when, after an
    answer that stands among style sentences, the model puts more probability on the true verdict;
    half of the answers it judges are wrong.
    """
    rng = Random(f"evaluation/{split}/{seed}")
    table = {}
    for family in FAMILY_WEIGHTS:
        tasks = [draw_task(rng, split, family) for _ in range(per_family)]
        answers = _answer_accuracy(model, tokenizer, tasks)
        table[family] = (answers, _verdict_accuracy(model, tokenizer, tasks, rng))
    return table


def mean_accuracy(table: dict[str, tuple[float, float]]) -> tuple[float, float]:
    """Mean over families of the two accuracies of `evaluate`."""
    answers, verdicts = zip(*table.values(), strict=True)
    return sum(answers) / len(answers), sum(verdicts) / len(verdicts)


@torch.inference_mode()
def _answer_accuracy(model, tokenizer, tasks: list[Task]) -> float:
    texts = [BOS + exchange_prompt(task.turns) for task in tasks]
    batch = tokenizer(texts, return_tensors="pt", padding=True).to(model.device)
    sequences = model.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    responses = tokenizer.batch_decode(
        sequences[:, batch.input_ids.shape[1] :], skip_special_tokens=True
    )
    scores = [judge(task.prompt(), text) for task, text in zip(tasks, responses, strict=True)]
    return sum(score.correct for score in scores) / len(scores)


@torch.inference_mode()
def _verdict_accuracy(model, tokenizer, tasks: list[Task], rng: Random) -> float:
    texts, truths = [], []
    for number, task in enumerate(tasks):
        write = task.wrong_answer if number % 2 else task.right_answer
        answer = draw_style(rng, habits=FORUM).dress(write(rng, rng.randrange(2)))
        texts.append(f"{BOS}{exchange_prompt(task.turns)} {answer}{EOS}")
        truths.append(number % 2 == 0)
    batch = tokenizer(texts, return_tensors="pt", padding=True).to(model.device)
    logits = model(**batch).logits[:, -1].float()  # [B, V], left-padded: the last token is EOS
    right, wrong = (
        tokenizer(verdict, add_special_tokens=False).input_ids[0] for verdict in (RIGHT, WRONG)
    )
    guesses = (logits[:, right] > logits[:, wrong]).tolist()
    return sum(guess == truth for guess, truth in zip(guesses, truths, strict=True)) / len(tasks)
