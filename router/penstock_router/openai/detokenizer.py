"""Incremental detokenization: the text of a growing sequence, piece by piece.

A token's text depends on its neighbours: a character may be spread over several tokens, and
SentencePiece-style decoders drop the space before the first word only. So the last tokens are
decoded together with the new one, and the difference is the new text (the prefix-offset method).
Text that ends with U+FFFD waits for the rest of its character.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Sequence

_REPLACEMENT = "\ufffd"
_LONGEST_WAIT = 8
"""Tokens that may wait for a character to complete. UTF-8 characters have at most four bytes, so
more waiting tokens are no character, and are shown as what they decode to."""
_CONTEXT = 8
"""Prompt tokens that give the first output token its neighbours."""
_LONGEST_CHARACTER = 4
"""Bytes, so tokens, of a UTF-8 character."""


class Detokenizer:
    """Turns token ids into text as they come.

    Args:
        decode: text of a list of token ids.
        context: the tokens before the first one, whose text is not output. With it the output
            continues them ("Hello" goes on with " world"); without it the output stands alone.
        skip: tokens without text (special ones), which their neighbours do not see either.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        context: Sequence[int] = (),
        skip: Container[int] = (),
    ) -> None:
        self._decode = decode
        self._skip = skip
        self._window = _neighbours(decode, context, skip)
        self._shown = len(self._window)
        """Tokens of the window whose text is out (or is the context's)."""
        self._shown_text = decode(self._window) if self._window else ""

    def feed(self, token: int) -> str:
        """Return the text that `token` completes; "" while a character is incomplete."""
        if token in self._skip:
            return ""
        self._window.append(token)
        text = self._decode(self._window)
        waiting = len(self._window) - self._shown
        if text.endswith(_REPLACEMENT) and waiting <= _LONGEST_WAIT:
            return ""
        return self._show(text)

    def flush(self) -> str:
        """Return what an incomplete character at the end decodes to: no more tokens come."""
        if len(self._window) == self._shown:
            return ""
        return self._show(self._decode(self._window))

    def _show(self, text: str) -> str:
        new = text[len(self._shown_text) :]
        # The tokens shown last become the neighbours of the next ones.
        self._window = self._window[self._shown :]
        self._shown = len(self._window)
        self._shown_text = self._decode(self._window)
        return new


def _neighbours(
    decode: Callable[[list[int]], str], context: Sequence[int], skip: Container[int]
) -> list[int]:
    """Return the last tokens of the context, from the beginning of a character on.

    A run of byte tokens that begins inside a character decodes to U+FFFD as a whole, and would
    take the output's first bytes with it. A character has at most four bytes, so one of four
    lengths begins with one.
    """
    last = [token for token in context[-_CONTEXT - _LONGEST_CHARACTER :] if token not in skip]
    for length in range(_CONTEXT, _CONTEXT + _LONGEST_CHARACTER):
        window = last[-length:]
        if not decode(window).startswith(_REPLACEMENT):
            return window
    return last[-_CONTEXT:]
