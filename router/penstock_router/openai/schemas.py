"""The requests of the OpenAI API, with strict types and the limits of each parameter.

A parameter is one of four things: understood (a field below), without effect on the answer
(ignored), known but not supported (refused unless it says what happens anyway), or unknown
(refused, so that a misspelt parameter is not silently lost). `null` means not given.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from penstock_router.errors import InvalidRequest

_NO_EFFECT = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)

_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    # What each may say without asking for anything that is not there.
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_json": (),
    "guided_regex": (),
    "modalities": (["text"],),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 512
MAX_CHOICES = 128
"""Of `n`, and of the prompts of one request."""


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class StreamOptions(_Strict):
    """How a stream is sent."""

    include_usage: bool = False
    include_obfuscation: bool = False
    """Accepted for OpenAI's clients; there is no padding."""


class _Generation(_Strict):
    """What chat and plain completions have in common."""

    model: str
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] = 0
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1)] = 0
    """0 and -1: no limit."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0
    logit_bias: dict[int, float] = Field(default_factory=dict)
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: list[Annotated[int, Field(ge=0, lt=2**31)]] = Field(
        default_factory=list, max_length=128
    )
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    cache_salt: Annotated[str, Field(max_length=1024)] = ""
    """Requests of different salts never share KV."""

    @field_validator("stop", mode="plain")
    @classmethod
    def _stops(cls, value: object) -> tuple[str, ...]:
        stops = [value] if isinstance(value, str) else value
        if (
            not isinstance(stops, list)
            or len(stops) > MAX_STOPS
            or not all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_CHARACTERS for s in stops)
        ):
            raise PydanticCustomError(
                "stop",
                f"Input should be a string, or a list of at most {MAX_STOPS}, of 1 to "
                f"{MAX_STOP_CHARACTERS} characters each",
            )
        return tuple(stops)

    @field_validator("logit_bias", mode="plain")
    @classmethod
    def _biases(cls, value: object) -> dict[int, float]:
        if not isinstance(value, dict) or len(value) > 1024:
            raise PydanticCustomError("bias", "Input should be an object of at most 1024 biases")
        biases: dict[int, float] = {}
        for token, bias in value.items():
            if not (isinstance(token, str) and token.isascii() and token.isdigit()):
                raise PydanticCustomError("bias", "Keys should be token ids")
            number = isinstance(bias, int | float) and not isinstance(bias, bool)
            if not number or not -100 <= bias <= 100:
                raise PydanticCustomError("bias", "Biases should be numbers from -100 to 100")
            biases[int(token)] = float(bias)
        return biases


class Message(BaseModel):
    """One message of a conversation. `content` is text, or parts of which all are text."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str
    name: str | None = None
    tool_calls: object = None

    @field_validator("content", mode="plain")
    @classmethod
    def _content(cls, value: object) -> str:
        if isinstance(value, str):
            return value
        if not isinstance(value, list) or not value:
            raise PydanticCustomError("content", "Input should be a string or a list of text parts")
        return "\n".join(_text_part(part) for part in value)

    @field_validator("tool_calls", mode="plain")
    @classmethod
    def _no_tools(cls, value: object) -> object:
        if value:
            raise PydanticCustomError("tools", "Tool calls are not supported")
        return None

    def rendered(self) -> dict[str, Any]:
        """Return the message as chat templates know it; a developer speaks as the system."""
        role = "system" if self.role == "developer" else self.role
        name = {} if self.name is None else {"name": self.name}
        return {"role": role, "content": self.content} | name


class ChatRequest(_Generation):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Further variables for the chat template."""


class CompletionRequest(_Generation):
    """POST /v1/completions. `prompt` is one text or one list of token ids, or a list of such."""

    prompt: list[str | list[int]]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    add_special_tokens: bool = True

    @field_validator("prompt", mode="plain")
    @classmethod
    def _prompts(cls, value: object) -> list[str | list[int]]:
        single = isinstance(value, str) or (isinstance(value, list) and _are_ids(value))
        prompts = [value] if single else value
        if (
            not isinstance(prompts, list)
            or not 0 < len(prompts) <= MAX_CHOICES
            or not all(isinstance(p, str) or (isinstance(p, list) and _are_ids(p)) for p in prompts)
        ):
            raise PydanticCustomError(
                "prompt",
                "Input should be a string, a list of token ids, or a list of at most "
                f"{MAX_CHOICES} of either, none empty",
            )
        return prompts


class TokenizeRequest(_Strict):
    """POST /tokenize: a text, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool = True
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)


class DetokenizeRequest(_Strict):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0, lt=2**31)]]
    skip_special_tokens: bool = False


_Model = TypeVar("_Model", bound=BaseModel)


def parse_body(body: bytes, schema: type[_Model]) -> _Model:
    """Return the request in `body`. Raises InvalidRequest naming the parameter that is wrong."""
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"the body is not JSON: {error}", code="invalid_json") from error
    if not isinstance(value, dict):
        raise InvalidRequest("the body is not a JSON object", code="invalid_json")
    given = {
        name: each
        for name, each in value.items()
        if each is not None and name not in _NO_EFFECT and not _asks_nothing(name, each, schema)
    }
    try:
        return schema.model_validate(given)
    except ValidationError as error:
        raise _invalid(error) from error


def _asks_nothing(name: str, value: object, schema: type[BaseModel]) -> bool:
    """Return whether an unsupported parameter only asks for what happens anyway."""
    if name not in _UNSUPPORTED or name in schema.model_fields:
        return False
    if any(value == neutral for neutral in _UNSUPPORTED[name]):
        return True
    raise InvalidRequest(
        f"the parameter '{name}' is not supported with this value; leave it out",
        param=name,
        code="unsupported_parameter",
    )


def _invalid(error: ValidationError) -> InvalidRequest:
    first = error.errors(include_url=False, include_context=False)[0]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
    param = param.removeprefix(".")
    if first["type"] == "missing":
        return InvalidRequest(
            f"the parameter '{param}' is missing", param=param, code="missing_required_parameter"
        )
    if first["type"] == "extra_forbidden":
        return InvalidRequest(
            f"the parameter '{param}' is unknown", param=param, code="unknown_parameter"
        )
    return InvalidRequest(
        f"the parameter '{param}' is wrong: {first['msg']}", param=param, code="invalid_value"
    )


def _are_ids(value: list[Any]) -> bool:
    return bool(value) and all(type(each) is int for each in value)


def _text_part(part: object) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        raise PydanticCustomError(
            "part", "Content parts of type {kind} are not supported, only text", {"kind": str(kind)}
        )
    text = part.get("text")
    if not isinstance(text, str):
        raise PydanticCustomError("part", "A text part should have a string 'text'")
    return text
