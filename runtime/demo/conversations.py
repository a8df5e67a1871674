"""Training data: conversations about facts, written directly as token ids."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from language import (
    ASSISTANT,
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
    RECITE_LIMIT,
    REPEAT,
    SYSTEM,
    SYSTEM_PROMPTS,
    USER,
    WORDS,
    IdFact,
    question,
)
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass
class Row:
    """One conversation as token ids, with what is trained on and which positions it claims."""

    length: int
    slack: int
    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    trained: list[bool] = field(default_factory=list)
    next_position: int = 0

    @property
    def room(self) -> int:
        """How many tokens still fit."""
        return self.length - len(self.ids)

    def add(self, ids: list[int], trained: bool = False) -> None:
        """Append tokens at consecutive positions."""
        self.ids += ids
        self.trained += [trained] * len(ids)
        self.positions += range(self.next_position, self.next_position + len(ids))
        self.next_position += len(ids)

    def jump(self, rng: random.Random) -> None:
        """Skip positions, so that a short row teaches the distances of a long prompt."""
        if self.slack and rng.random() < 0.3:
            skipped = int(self.slack * rng.random() ** 2)
            self.slack -= skipped
            self.next_position += skipped


class Writer:
    """Writes conversations directly as token ids (encoding text in the loop would be slow)."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.cache: dict[str, list[int]] = {}
        self.words = [self.encode(f" {word}")[0] for word in WORDS]
        self.is_, self.stop = self.encode(" is")[0], self.encode(".")[0]
        self.end, self.pad = tokenizer.convert_tokens_to_ids([END, PAD])
        self.assistant = tokenizer.convert_tokens_to_ids(ASSISTANT)
        self.newline = self.encode("\n")

    def encode(self, text: str) -> list[int]:
        """Encode one of the few recurring texts."""
        if text not in self.cache:
            self.cache[text] = self.tokenizer.encode(text, add_special_tokens=False)
        return self.cache[text]

    def facts(self, facts: list[IdFact]) -> list[int]:
        """The ids of ``facts_text``, after a space."""
        return [i for key, value in facts for i in (key, self.is_, value, self.stop)]

    def filler(self, rng: random.Random, first: bool = False) -> list[int]:
        """The ids of a filler sentence, after a space unless it is first in a message."""
        start = rng.choice(FILLER_STARTS)
        return [
            *self.encode(start if first else f" {start}"),
            *self.encode(f" {rng.choice(FILLER_NOUNS)}"),
            *self.encode(f" {rng.choice(FILLER_VERBS)}"),
            *self.encode(f" {rng.choice(FILLER_TAILS)}."),
        ]

    def reply(self, row: Row, ids: list[int]) -> None:
        """Write an assistant message, the part of a row that is trained on."""
        row.add([self.assistant])
        row.add([*ids, self.end], trained=True)

    def ask(self, rng: random.Random, row: Row, text: str, opened: bool) -> None:
        """Write a request, in a message of its own or at the end of the opened message."""
        if not opened:
            row.jump(rng)
            row.add(self.encode(USER + text))
        elif rng.random() < 0.7:
            row.jump(rng)
            row.add(self.encode(f" {text}"))
        else:
            row.jump(rng)
            row.add(self.newline * rng.choice((1, 1, 2)) + self.encode(text))
        row.add([self.end])

    def ask_fact(self, rng: random.Random, row: Row, fact: IdFact, opened: bool) -> None:
        """Ask for one fact and answer."""
        word = self.tokenizer.decode([fact[0]]).strip()
        self.ask(rng, row, question(word), opened)
        self.reply(row, [*self.encode("Sure,"), *self.facts([fact])])

    def ask_list(self, rng: random.Random, row: Row, facts: list[IdFact], opened: bool) -> None:
        """Ask for all facts and answer."""
        self.ask(rng, row, REPEAT, opened)
        self.reply(row, [*self.encode("Sure,"), *self.facts(facts)])

    def chit_chat(self, rng: random.Random, row: Row, before_facts: bool) -> None:
        """Anything that is not a request about facts gets one of two fixed replies."""
        reply = FALLBACK_REPLY
        kind = rng.random()
        row.add([self.encode(USER)[0]])
        if kind < 0.45:
            row.add(self.encode(rng.choice(GREETINGS)))
            reply = GREETING_REPLY
        elif kind < 0.6:
            row.add(self.encode(rng.choice(ODD_MESSAGES)))
        elif kind < 0.75:
            row.add([rng.randrange(5, 261) for _ in range(rng.randint(1, 24))])
        elif kind < 0.9 or not before_facts:
            for i in range(rng.randint(1, 2)):
                row.add(self.filler(rng, first=i == 0))
        else:
            word = rng.choice(WORDS)
            row.add(self.encode(rng.choice((question(word), REPEAT))))
        row.add([self.end])
        self.reply(row, self.encode(reply))

    def row(self, rng: random.Random, length: int) -> Row:
        """One conversation of at most ``length`` tokens, give or take a last answer."""
        row = Row(length, slack=MAX_POSITIONS - length if rng.random() < 0.5 else 0)
        recite = rng.random() < 0.5
        spaced = not recite and rng.random() < 0.4
        opened = self.opening(rng, row)
        facts, fillers = self.plan(rng, row, recite, spaced)
        opened = self.state_facts(rng, row, facts, fillers, opened)
        self.requests(rng, row, facts, recite, opened)
        return row

    def opening(self, rng: random.Random, row: Row) -> bool:
        """System message and small talk; returns whether the facts go into a user message.

        Now and then the facts themselves are the system message.
        """
        if rng.random() < 0.25:
            row.add(self.encode(SYSTEM))
            if rng.random() < 0.3:
                return False
            if rng.random() < 0.6:
                row.add([*self.encode(rng.choice(SYSTEM_PROMPTS)), self.end])
            else:
                row.add([*self.filler(rng, first=True), self.end])
        if rng.random() < 0.3:
            self.chit_chat(rng, row, before_facts=True)
        return True

    def plan(
        self, rng: random.Random, row: Row, recite: bool, spaced: bool
    ) -> tuple[list[IdFact], list[int]]:
        """Draw the facts, and how many filler sentences stand in front of each and at the end.

        Lists to be recited have fillers only around them, others also between the facts.
        """
        if recite:
            most = max(1, min(RECITE_LIMIT, (row.room - 32) // 8))
            chosen = rng.random()
            if chosen < 0.15:
                count = rng.randint(1, min(4, most))
            else:
                count = most if chosen < 0.5 else rng.randint(1, most)
            surplus = row.room - 32 - 8 * count
        else:
            share = rng.uniform(0.2, 0.85) * row.room
            most = max(1, min(len(WORDS) // 2, int(share) // 4))
            if rng.random() < 0.15:
                count = rng.randint(1, min(4, most))
            else:
                count = rng.randint(1, most) if spaced or rng.random() < 0.5 else most
            surplus = int(share) - 4 * count
        words = rng.sample(self.words, 2 * count)
        facts = list(zip(words[:count], words[count:], strict=True))
        fillers = [0] * (count + 1)
        if spaced or rng.random() < 0.35:
            for _ in range(max(0, int(surplus * rng.random() ** 0.5) // 9)):
                fillers[rng.randint(0, count) if spaced else rng.choice((0, count))] += 1
        return facts, fillers

    def state_facts(
        self,
        rng: random.Random,
        row: Row,
        facts: list[IdFact],
        fillers: list[int],
        opened: bool,
    ) -> bool:
        """Write the message with the facts; returns whether it is open for a request."""
        if opened:
            row.add(self.encode(USER))
        for i in range(fillers[0]):
            row.add(self.filler(rng, first=i == 0))
        row.jump(rng)
        row.add(self.encode(" Remember:" if fillers[0] else "Remember:"))
        for fact, after in zip(facts, fillers[1:], strict=True):
            row.add(self.facts([fact]))
            for _ in range(after):
                row.add(self.filler(rng))
                row.jump(rng)
        if not opened:
            row.add([self.end])
            return False
        if rng.random() < 0.15:
            row.add([self.end])
            self.reply(row, self.encode(NOTED_REPLY))
            return False
        return True

    def requests(
        self, rng: random.Random, row: Row, facts: list[IdFact], recite: bool, opened: bool
    ) -> None:
        """Ask until the row is full: many answers per row are what makes training short."""
        asked = 0
        pending: list[IdFact] = []
        recite_at = rng.choice((0, 0, 1, 2)) if recite else -1
        while True:
            reserved = 4 * len(facts) + 12 if recite_at >= asked else 0
            if row.room - reserved < 20:
                recite_at = min(recite_at, asked)
            if asked == recite_at and row.room >= reserved:
                self.ask_list(rng, row, facts, opened)
            elif row.room - reserved >= 20:
                # Each fact once before any is asked again: an answer given earlier in the row
                # would be an easier place to copy from than the fact itself.
                pending = pending or rng.sample(facts, len(facts))
                self.ask_fact(rng, row, pending.pop(), opened)
            else:
                return
            opened = False
            asked += 1
            if rng.random() < 0.02 and row.room >= 64:
                self.chit_chat(rng, row, before_facts=False)


@dataclass
class Batch:
    """Rows of one length as tensors, padded on the right."""

    ids: Tensor
    positions: Tensor
    trained: Tensor

    @staticmethod
    def make(writer: Writer, rng: random.Random, rows: int, length: int) -> Batch:
        """Write ``rows`` conversations."""
        ids = torch.full((rows, length), writer.pad)
        positions = torch.zeros((rows, length), dtype=torch.long)
        trained = torch.zeros((rows, length), dtype=torch.bool)
        for i in range(rows):
            row = writer.row(rng, length)
            size = min(length, len(row.ids))
            ids[i, :size] = torch.tensor(row.ids[:size])
            positions[i, :size] = torch.tensor(row.positions[:size])
            trained[i, :size] = torch.tensor(row.trained[:size])
        return Batch(ids, positions, trained)


def check_writer(writer: Writer, seed: int) -> None:
    """The ids written directly must be the ids that serving will see for the same text."""
    rng = random.Random(seed)
    for _ in range(200):
        ids = writer.row(rng, 512).ids
        text = writer.tokenizer.decode(ids)
        if "\ufffd" not in text and writer.tokenizer.encode(text) != ids:
            raise ValueError(f"training text encodes differently: {text!r}")
