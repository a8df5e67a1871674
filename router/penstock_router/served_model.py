"""The model as the router needs it: tokenizer, chat template, limits; no weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from penstock_router.errors import ModelUnusable
from penstock_router.openai.chat_template import ChatTemplate, load_chat_template, token_text
from penstock_router.openai.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from pathlib import Path

FILES = ("*.json", "*.jinja")
"""What the router needs of a checkpoint."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedModel:
    """A model under the name that clients know."""

    name: str
    created: int
    """Unix time in seconds, for /v1/models."""
    tokenizer: TextTokenizer
    chat_template: ChatTemplate | None
    eos_ids: tuple[int, ...]
    """Tokens that end an answer."""
    vocab_size: int
    """Token ids below it are valid."""
    max_model_len: int
    """Tokens of prompt and output together, by the configuration; workers may have less."""


def load_served_model(directory: Path, *, name: str, created: int) -> ServedModel:
    """Read a checkpoint directory in Hugging Face format.

    Raises:
        ModelUnusable: a file is missing or unusable; names it and the remedy.
    """
    config = _read_json(directory / "config.json", required=True)
    generation = _read_json(directory / "generation_config.json")
    tokenizer_config = _read_json(directory / "tokenizer_config.json")
    tokenizer = TextTokenizer.load(directory)
    max_model_len = config.get("max_position_embeddings")
    if not isinstance(max_model_len, int) or max_model_len < 1:
        raise ModelUnusable(f"{directory / 'config.json'} has no usable max_position_embeddings")
    return ServedModel(
        name=name,
        created=created,
        tokenizer=tokenizer,
        chat_template=load_chat_template(directory, tokenizer_config),
        eos_ids=_eos_ids(config, generation, tokenizer_config, tokenizer),
        vocab_size=int(config.get("vocab_size") or tokenizer.vocab_size),
        max_model_len=max_model_len,
    )


def _eos_ids(
    config: dict[str, Any],
    generation: dict[str, Any],
    tokenizer_config: dict[str, Any],
    tokenizer: TextTokenizer,
) -> tuple[int, ...]:
    """Return every token that one of the files calls an end of sequence."""
    found: set[int] = set()
    for source in (generation, config):
        value = source.get("eos_token_id")
        values = value if isinstance(value, list) else [value]
        found.update(each for each in values if isinstance(each, int))
    text = token_text(tokenizer_config.get("eos_token"))
    token = tokenizer.token_id(text) if text is not None else None
    if token is not None:
        found.add(token)
    return tuple(sorted(found))


def _read_json(path: Path, *, required: bool = False) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if not required:
            return {}
        raise ModelUnusable(
            f"{path} is not there; the model must be a checkpoint directory in Hugging Face format"
        ) from None
    except (OSError, ValueError) as error:
        raise ModelUnusable(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ModelUnusable(f"{path} is not a JSON object")
    return value
