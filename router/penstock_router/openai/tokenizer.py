"""Text to token ids and back, by a checkpoint's tokenizer.json alone."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from penstock_router.errors import ModelUnusable
from penstock_router.openai.detokenizer import Detokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TextTokenizer:
    """A tokenizer with what the API needs beyond encode and decode.

    Args:
        tokenizer: its truncation and padding are switched off.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._added = {token_id: token.content for token_id, token in added.items()}
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        """Control tokens, whose text is not output."""
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)
        kinds = set(_decoder_kinds(json.loads(tokenizer.to_str()).get("decoder")))
        self._bytes_of_char = _byte_level_alphabet() if "ByteLevel" in kinds else None
        self._byte_fallback = "ByteFallback" in kinds

    @classmethod
    def load(cls, directory: Path) -> TextTokenizer:
        """Read `directory`/tokenizer.json. Raises ModelUnusable naming file and remedy."""
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise ModelUnusable(
                f"{path} is not there; save the checkpoint with a fast tokenizer "
                "(AutoTokenizer.from_pretrained(...).save_pretrained(directory))"
            )
        try:
            return cls(Tokenizer.from_file(str(path)))
        except Exception as error:
            raise ModelUnusable(f"{path} is not a tokenizer: {error}") from error

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the token ids of `text`; special tokens spelled out in it are recognized."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of `ids`."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def detokenizer(
        self, *, context: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> Detokenizer:
        """Return a detokenizer of one output that follows `context`."""

        def decode(ids: list[int]) -> str:
            return self.decode(ids, skip_special_tokens=False)

        return Detokenizer(decode, context, self.special_ids if skip_special_tokens else ())

    def token_id(self, content: str) -> int | None:
        """Return the id of the token spelled `content`, or None."""
        found: int | None = self._tokenizer.token_to_id(content)
        return found

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes that `token` stands for by itself, b"" for an unknown id."""
        if token in self._added:
            return self._added[token].encode()
        piece: str | None = self._tokenizer.id_to_token(token)
        if piece is None:
            return b""
        if self._bytes_of_char is not None:
            return bytes(b for char in piece for b in self._bytes_of_char.get(char, char.encode()))
        if self._byte_fallback and (match := _BYTE_TOKEN.fullmatch(piece)):
            return bytes([int(match[1], 16)])
        return piece.replace("\u2581", " ").encode()

    def token_text(self, token: int) -> str:
        r"""Return `token`'s text; bytes that are no text by themselves as OpenAI writes them.

        That is "bytes:\xe2\x80".
        """
        raw = self.token_bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _decoder_kinds(decoder: dict[str, Any] | None) -> list[str]:
    if decoder is None:
        return []
    inner = decoder.get("decoders", [])
    return [decoder["type"], *(kind for each in inner for kind in _decoder_kinds(each))]


def _byte_level_alphabet() -> dict[str, bytes]:
    """Return the byte that each character of a byte-level vocabulary stands for.

    GPT-2's rule: printable bytes of Latin-1 stand for themselves, the others, in order, for the
    characters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    alphabet = {chr(byte): bytes([byte]) for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    return alphabet | {chr(0x100 + at): bytes([byte]) for at, byte in enumerate(others)}
