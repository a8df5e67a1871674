"""Tiny checkpoints without weights: real tokenizers of the two kinds, made on the spot."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

if TYPE_CHECKING:
    from pathlib import Path

CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "hello world, this is a small model that says hello to the world",
    "Grüße aus Köln, naïve café, 你好世界, 🙂🚀",
    "stop strings and tokens cross borders",
]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' and not loop.first %}"
    "{{ raise_exception('the system message must come first') }}{% endif %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<s>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


def byte_level() -> Tokenizer:
    """GPT-2's kind: every byte is a character of the vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    return tokenizer


def metaspace() -> Tokenizer:
    """Llama 2's kind: spaces are U+2581, unknown characters fall back to byte tokens."""
    pieces = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = sorted({char for line in CORPUS for char in line if char.isascii() and char != " "})
    vocabulary = {piece: at for at, piece in enumerate([*pieces, "\u2581", *letters])}
    merges: list[tuple[str, str]] = []
    for word in ("hello", "world", "the"):
        left = "\u2581"
        for char in word:
            merges.append((left, char))
            left += char
            vocabulary[left] = len(vocabulary)
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", *SPECIAL)])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def write_checkpoint(
    directory: Path,
    *,
    tokenizer: Tokenizer | None = None,
    max_model_len: int = 512,
    chat_template: str | None = CHAT_TEMPLATE,
    **config: Any,
) -> Path:
    """Write a checkpoint directory without weights, and return it."""
    tokenizer = tokenizer or byte_level()
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    eos = tokenizer.token_to_id("<|end|>")
    (directory / "config.json").write_text(
        json.dumps(
            {"vocab_size": size, "max_position_embeddings": max_model_len, "eos_token_id": eos}
            | config
        )
    )
    tokenizer_config: dict[str, Any] = {
        "bos_token": {"content": "<s>", "special": True},
        "eos_token": "<|end|>",
    }
    if chat_template is not None:
        tokenizer_config["chat_template"] = chat_template
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return directory
