"""How well a saved demo model does what it was made for."""

from __future__ import annotations

import math
import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from language import (
    FALLBACK_REPLY,
    GREETING_REPLY,
    GREETINGS,
    MAX_POSITIONS,
    ODD_MESSAGES,
    REPEAT,
    Message,
    answer,
    draw_facts,
    facts_text,
    filler_sentence,
    question,
)
from tokenizer import check_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3ForCausalLM,
)

if TYPE_CHECKING:
    from pathlib import Path


@dataclass
class Case:
    """A conversation that ends with a user message, and the only right reply."""

    messages: list[Message]
    expected: str


@dataclass
class Score:
    """What came out for a group of cases."""

    total: int = 0
    right: int = 0
    margin: float = math.inf
    longest_prompt: int = 0

    def line(self, label: str) -> str:
        """One row of the table of results."""
        return (
            f"| {label} | {self.longest_prompt} | {self.right}/{self.total} "
            f"| {100 * self.right / self.total:.2f} % | {self.margin:.2f} |"
        )


def user(text: str) -> Message:
    """A message from the user."""
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    """An earlier reply."""
    return {"role": "assistant", "content": text}


def look_up_case(rng: random.Random, count: int, depth: float, length: int = 0) -> Case:
    """One question at a relative depth (0..1); fillers between the facts up to ``length`` tokens.

    A fact has 4 tokens and a filler sentence about 9, so the length is met approximately.
    """
    facts = draw_facts(rng, count)
    fillers: list[list[str]] = [[] for _ in range(count + 1)]
    for _ in range(max(0, (length - 4 * count) // 9)):
        rng.choice(fillers).append(filler_sentence(rng))
    parts = [*fillers[0], "Remember:"]
    for fact, after in zip(facts, fillers[1:], strict=True):
        parts += [facts_text([fact]), *after]
    asked = facts[min(count - 1, int(depth * count))]
    return Case([user(" ".join([*parts, question(asked[0])]))], answer([asked]))


def recite_case(rng: random.Random, count: int) -> Case:
    """A list, to be repeated in the first turn."""
    facts = draw_facts(rng, count)
    return Case([user(f"Remember: {facts_text(facts)} {REPEAT}")], answer(facts))


def third_turn_case(rng: random.Random, count: int, recite: bool) -> Case:
    """Two questions have been answered already; the third reply is measured."""
    facts = draw_facts(rng, count)
    one, two, three = (rng.choice(facts) for _ in range(3))
    messages = [
        user(f"Remember: {facts_text(facts)} {question(one[0])}"),
        assistant(answer([one])),
        user(question(two[0])),
        assistant(answer([two])),
        user(REPEAT if recite else question(three[0])),
    ]
    return Case(messages, answer(facts if recite else [three]))


@torch.no_grad()
def measure(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, cases: list[Case]
) -> Score:
    """Greedy generation, compared as text; the margin is top-1 minus top-2 over all steps."""
    score = Score()
    by_length: dict[int, list[tuple[list[int], str]]] = {}
    for case in cases:
        ids = tokenizer.apply_chat_template(
            case.messages, add_generation_prompt=True, return_dict=True
        )["input_ids"]
        by_length.setdefault(len(ids), []).append((ids, case.expected))
    for length, group in sorted(by_length.items()):
        score.longest_prompt = max(score.longest_prompt, length)
        width = max(1, min(32, 16384 // length))  # equal lengths, so a batch needs no padding
        for start in range(0, len(group), width):
            part = group[start : start + width]
            prompt = torch.tensor([ids for ids, _ in part])
            longest = max(len(tokenizer.encode(expected)) for _, expected in part)
            result = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=min(longest + 8, MAX_POSITIONS - length),
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
            best = torch.stack(result.logits, 1).topk(2).values
            margins = best[..., 0] - best[..., 1]
            for i, (_, expected) in enumerate(part):
                new = result.sequences[i, length:].tolist()
                ended = tokenizer.eos_token_id in new
                steps = new.index(tokenizer.eos_token_id) + 1 if ended else len(new)
                text = tokenizer.decode(new[: steps - 1] if ended else new)
                score.total += 1
                score.right += ended and text == expected
                score.margin = min(score.margin, margins[i, :steps].min().item())
    return score


def evaluate(out: Path, seed: int, scale: float) -> None:
    """Measure the saved files, the way a server would read them, with facts never trained on."""
    tokenizer = AutoTokenizer.from_pretrained(out)
    check_tokenizer(tokenizer)
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    rng = random.Random(f"evaluation {seed}")

    def show(label: str, cases: list[Case]) -> None:
        started = time.monotonic()
        line = measure(model, tokenizer, cases).line(label)
        print(line + f"  <!-- {time.monotonic() - started:.0f}s -->", flush=True)

    def look_ups(count: int, number: int, length: int = 0) -> list[Case]:
        number = max(2, int(number * scale))
        return [look_up_case(rng, count, i / (number - 1), length) for i in range(number)]

    def recitals(count: int, number: int) -> list[Case]:
        return [recite_case(rng, count) for _ in range(max(2, int(number * scale)))]

    print("| task | prompt tokens | right | accuracy | smallest margin |")
    print("|---|---|---|---|---|")
    for count, number in ((1, 200), (10, 400), (50, 400), (120, 400), (250, 400), (500, 300)):
        show(f"look up, {count} facts", look_ups(count, number))
    show("look up, 600 facts", look_ups(600, 200))
    for length, number in ((500, 200), (1000, 200), (2000, 200), (4000, 150), (8000, 60)):
        count = min(450, length // 12)
        show(f"look up, {count} facts and fillers", look_ups(count, number, length))
    recited = ((1, 100), (10, 200), (30, 200), (60, 200), (100, 200), (150, 60), (200, 30))
    for count, number in recited:
        show(f"recite {count} facts", recitals(count, number))
    for count in (5, 50, 300):
        cases = [third_turn_case(rng, count, False) for _ in range(int(200 * scale))]
        show(f"third turn, look up, {count} facts", cases)
    for count in (5, 50, 100):
        cases = [third_turn_case(rng, count, True) for _ in range(int(100 * scale))]
        show(f"third turn, recite {count} facts", cases)
    greetings = [Case([user(text)], GREETING_REPLY) for text in GREETINGS]
    show("greetings", greetings)
    show("other messages", [Case([user(text)], FALLBACK_REPLY) for text in ODD_MESSAGES])
