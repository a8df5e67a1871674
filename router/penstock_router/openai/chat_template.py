"""Chat templates: a conversation to the text that the model was trained on.

Templates come with the checkpoint and are written for Jinja as Hugging Face sets it up, so that
set-up is reproduced here: the immutable sandbox, trimmed blocks, loop controls, `raise_exception`,
`strftime_now`, a `tojson` that keeps characters as they are, and `{% generation %}` blocks.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from penstock_router.errors import InvalidRequest, ModelUnusable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from jinja2.parser import Parser


class ChatTemplate:
    """A compiled template.

    Args:
        source: Jinja.
        special: the special tokens' texts that the template may use, such as bos_token.

    Raises:
        ModelUnusable: the template has a syntax error.
    """

    def __init__(self, source: str, special: Mapping[str, str]) -> None:
        self._special = dict(special)
        try:
            self._template = _environment().from_string(source)
        except TemplateSyntaxError as error:
            raise ModelUnusable(
                f"the chat template has a syntax error in line {error.lineno}: {error.message}"
            ) from error

    def render(
        self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any] | None = None
    ) -> str:
        """Return the prompt's text, up to where the assistant's answer begins.

        Args:
            messages: the conversation.
            options: further variables of the template, such as enable_thinking.

        Raises:
            InvalidRequest: the template refuses the conversation.
        """
        variables = {"add_generation_prompt": True, "tools": None, "documents": None}
        variables |= self._special | dict(options or {}) | {"messages": list(messages)}
        try:
            return self._template.render(variables)
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise InvalidRequest(
                f"the model's chat template refuses the messages: {error}",
                param="messages",
                code="invalid_messages",
            ) from error


def load_chat_template(directory: Path, tokenizer_config: Mapping[str, Any]) -> ChatTemplate | None:
    """Return a checkpoint's template: chat_template.jinja, else that of tokenizer_config.json.

    None if it has none. Raises ModelUnusable if it has one that cannot be used.
    """
    path = directory / "chat_template.jinja"
    source: object = tokenizer_config.get("chat_template")
    if path.is_file():
        source = path.read_text(encoding="utf-8")
    if isinstance(source, list):
        named = {each.get("name"): each.get("template") for each in source}
        source = named.get("default")
    if source is None:
        return None
    if not isinstance(source, str):
        raise ModelUnusable(f"the chat_template of {directory} is not text")
    special = {
        name: text
        for name, value in tokenizer_config.items()
        if name.endswith("_token") and (text := token_text(value)) is not None
    }
    return ChatTemplate(source, special)


def token_text(value: object) -> str | None:
    """Return a special token's text: it is written as text, or as an object with `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _Generation(Extension):
    """`{% generation %}` marks the assistant's tokens for training; here it is only its content."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)  # noqa: DTZ005 - templates expect the local date
