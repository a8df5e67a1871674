from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock_router.errors import ConfigurationError
from penstock_router.openai.tokenizer import TextTokenizer
from tests.unit.router.tiny_models import byte_level, metaspace

if TYPE_CHECKING:
    from pathlib import Path

BYTE_LEVEL = TextTokenizer(byte_level())
METASPACE = TextTokenizer(metaspace())
BOTH = pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, METASPACE], ids=["bytes", "metaspace"])
TEXTS = st.text(st.sampled_from("ab the hello world\n.é你🙂🚀\u0301"), min_size=1, max_size=30)


def incremental(tokenizer: TextTokenizer, tokens: list[int], context: list[int]) -> list[str]:
    detokenizer = tokenizer.detokenizer(context=context)
    return [*(detokenizer.feed(token) for token in tokens), detokenizer.flush()]


@BOTH
@settings(max_examples=100)
@given(text=TEXTS)
def test_pieces_join_to_the_whole_text_and_none_is_broken(
    tokenizer: TextTokenizer, text: str
) -> None:
    tokens = tokenizer.encode(text, add_special_tokens=False)
    pieces = incremental(tokenizer, tokens, [])
    # Metaspace does not tell a text that begins with a space from one that does not.
    expected = text.removeprefix(" ") if tokenizer is METASPACE else text
    assert "".join(pieces) == tokenizer.decode(tokens) == expected
    assert not any("\ufffd" in piece for piece in pieces)


@BOTH
@settings(max_examples=100)
@given(before=TEXTS, after=TEXTS)
def test_a_continuation_keeps_its_leading_space(
    tokenizer: TextTokenizer, before: str, after: str
) -> None:
    whole = tokenizer.encode(before + after, add_special_tokens=False)
    cut = len(tokenizer.encode(before, add_special_tokens=False))
    context, tokens = whole[:cut], whole[cut:]
    if not tokenizer.decode(context).endswith("\ufffd"):
        expected = tokenizer.decode(whole).removeprefix(tokenizer.decode(context))
        assert "".join(incremental(tokenizer, tokens, context)) == expected


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9])
@BOTH
def test_a_context_of_byte_tokens_does_not_swallow_the_output(
    tokenizer: TextTokenizer, count: int
) -> None:
    context = tokenizer.encode("x" + "你" * count + "é" * (count % 2), add_special_tokens=False)
    tokens = tokenizer.encode(".", add_special_tokens=False)[-1:]
    assert "".join(incremental(tokenizer, tokens, context)) == "."


def test_the_first_space_belongs_to_a_continuation_only() -> None:
    tokens = METASPACE.encode("hello world", add_special_tokens=False)
    hello, world = tokens[:1], tokens[1:]
    assert METASPACE.decode(hello) == "hello"
    assert "".join(incremental(METASPACE, world, hello)) == " world"
    assert "".join(incremental(METASPACE, world, [])) == "world"


@BOTH
def test_special_tokens_have_no_text_and_hide_no_space(tokenizer: TextTokenizer) -> None:
    end = tokenizer.token_id("<|end|>")
    assert end is not None
    tokens = tokenizer.encode("hello world", add_special_tokens=False)
    spaced = [token for each in tokens for token in (each, end, end)]
    assert "".join(incremental(tokenizer, spaced, [end])) == "hello world"
    shown = tokenizer.detokenizer(skip_special_tokens=False)
    assert shown.feed(end) == "<|end|>"


@settings(max_examples=50)
@given(st.integers(0, 10**6))
def test_random_bytes_come_out_as_the_decoder_has_them(seed: int) -> None:
    rng = random.Random(seed)
    tokens = [rng.randrange(10, BYTE_LEVEL.vocab_size) for _ in range(20)]
    got = "".join(incremental(BYTE_LEVEL, tokens, []))
    assert got.replace("\ufffd", "") == BYTE_LEVEL.decode(tokens).replace("\ufffd", "")


def test_broken_bytes_are_not_waited_for_for_ever() -> None:
    lead = METASPACE.token_id("<0xE4>")
    assert lead is not None
    pieces = incremental(METASPACE, [lead] * 30, [])
    assert any(pieces[:-1])
    assert set("".join(pieces)) == {"\ufffd"}


@BOTH
@given(text=TEXTS)
@settings(max_examples=50)
def test_token_bytes_join_to_the_text(tokenizer: TextTokenizer, text: str) -> None:
    tokens = tokenizer.encode(text, add_special_tokens=False)
    joined = b"".join(tokenizer.token_bytes(token) for token in tokens).decode()
    spaced = " " if tokenizer is METASPACE and not text.startswith(" ") else ""
    assert joined == spaced + text


def test_token_text_writes_partial_characters_as_bytes() -> None:
    lead = METASPACE.token_id("<0xE4>")
    assert lead is not None
    assert METASPACE.token_text(lead) == "bytes:\\xe4"
    assert METASPACE.token_bytes(10**6) == b""


def test_special_tokens_are_added_only_when_asked() -> None:
    bos = BYTE_LEVEL.token_id("<s>")
    assert BYTE_LEVEL.encode("hello", add_special_tokens=True)[0] == bos
    assert BYTE_LEVEL.encode("hello", add_special_tokens=False)[0] != bos


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"tokenizer\.json is not there"):
        TextTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigurationError, match="is not a tokenizer"):
        TextTokenizer.load(tmp_path)
