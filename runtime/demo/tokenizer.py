"""The demo's tokenizer: a token a word of its language, bytes for everything else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from language import (
    ASSISTANT,
    CHAT_TEMPLATE,
    END,
    FALLBACK_REPLY,
    FILLER_NOUNS,
    FILLER_STARTS,
    FILLER_TAILS,
    FILLER_VERBS,
    GREETING_REPLY,
    GREETINGS,
    MAX_POSITIONS,
    NOTED_REPLY,
    ODD_MESSAGES,
    PAD,
    REPEAT,
    SPECIAL_TOKENS,
    SYSTEM,
    SYSTEM_PROMPTS,
    USER,
    WORDS,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

if TYPE_CHECKING:
    from collections.abc import Iterator


def vocabulary_corpus() -> Iterator[str]:
    """Every text the demo language can contain, at the start of a message and after a space."""
    yield from (f"x {word}" for word in WORDS)
    fillers = (*FILLER_NOUNS, *FILLER_VERBS, *FILLER_TAILS)
    yield from (f"x {text}." for text in fillers)
    fixed = (*GREETINGS, GREETING_REPLY, FALLBACK_REPLY, NOTED_REPLY, *SYSTEM_PROMPTS)
    for text in (*FILLER_STARTS, "Remember:", "What is?", REPEAT, "Sure,", *fixed):
        yield text
        yield f"x {text}"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words of the demo language, and single bytes for everything else.

    ``ignore_merges`` makes the BPE model take a pre-token that is in the vocabulary as it is, so
    there is no merge table; a pre-token that is not falls apart into bytes, and any text at all
    can be encoded and decoded without loss.
    """
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    counter = Tokenizer(models.WordLevel(unk_token=PAD))
    counter.pre_tokenizer = splitter
    trainer = trainers.WordLevelTrainer(vocab_size=8192, show_progress=False)
    counter.train_from_iterator(vocabulary_corpus(), trainer)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learned = sorted(set(counter.get_vocab()) - set(alphabet))
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *alphabet, *learned])}

    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def check_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    """Refuse to train on a tokenizer that would break the promises made to the tests."""
    if len(set(WORDS)) != len(WORDS) or len(WORDS) < 1000:
        raise ValueError("the word list needs at least 1,000 distinct words")
    clash = set(" ".join((*FILLER_NOUNS, *FILLER_VERBS, *FILLER_TAILS)).split()) & set(WORDS)
    if clash:
        raise ValueError(f"words used both in fillers and in facts: {sorted(clash)}")
    for word in WORDS:
        if len(tokenizer.encode(f" {word}", add_special_tokens=False)) != 1:
            raise ValueError(f"{word!r} is not one token")
    for text in (*ODD_MESSAGES, "  two  spaces \n\n\t é ☃ 漢字 👩‍👩‍👧 \x00 don't . , !"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        if tokenizer.decode(ids) != text:
            raise ValueError(f"{text!r} does not survive the round trip")
