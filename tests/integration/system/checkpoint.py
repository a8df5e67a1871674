"""A tiny random model with a tokenizer, in Hugging Face format, and its greedy reference."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, Qwen3Config

if TYPE_CHECKING:
    from pathlib import Path

VOCABULARY = 288
EOS = 287


def make(path: Path, seed: int = 0, context: int = 2048) -> Path:
    """Write a 4-layer Qwen3 whose tokens are words; logits are spread well apart."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=context,
        tie_word_embeddings=False,
        eos_token_id=EOS,
    )
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                # The default initialisation gives nearly equal logits: any rounding would decide.
                parameter.mul_(4)
    model.save_pretrained(path)
    _word_tokenizer().save(str(path / "tokenizer.json"))
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    (path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template})
    )
    return path


def _word_tokenizer() -> Tokenizer:
    """Token 17 is the word t17, so a text tells its ids."""
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, "t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def ids(text: str) -> tuple[int, ...]:
    """Return the token ids of a text."""
    return tuple(int(word.removeprefix("t")) for word in text.split())


class Reference:
    """Greedy continuations by transformers, float32."""

    def __init__(self, path: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.greedy = lru_cache(maxsize=None)(self._greedy)

    def _greedy(self, prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
        with torch.inference_mode():
            sequence = self._model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                max_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=EOS,
            )
        output = sequence[0, len(prompt) :].tolist()
        return tuple(token for token in output if token != EOS)
