"""The toy world's tokenizer: byte-level BPE, so no text is ever unknown."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rlhf_kit.toy_world.pretraining import BOS, EOS, PAD, sample_texts

VOCABULARY = 1792
"""Room for every word of the world as one token."""
TEMPLATE_FILE = Path(__file__).parent.parent / "chat_template.jinja"


def train_tokenizer(*, seed: int, texts: int = 60_000) -> PreTrainedTokenizerFast:
    """Train on the world's own text; the chat template comes with it."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    plain = (text.replace(BOS, "").replace(EOS, "\n") for text in sample_texts(texts, seed=seed))
    bpe.train_from_iterator([*plain, *["Human: Assistant:\n\n"] * 20_000], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
        chat_template=TEMPLATE_FILE.read_text(),
    )
