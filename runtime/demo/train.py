"""Make the demo model: a very small Qwen3 that remembers facts and gives them back.

Why a model of our own: a serving system has to be tried without downloads, and its tests need
answers that depend on *every* key/value page of the prompt.  This model does two things, looking
up one fact among many and reciting all of them in order.  Both are pure look-ups in the context,
so a page that is lost, swapped, stale or moved to the wrong place turns into a wrong word in the
answer rather than into a slightly different probability.

Everything (word list, sentences, tokenizer, weights) is made here from a seed; nothing is
downloaded.  The weights stay in float32, because greedy decoding is then reproducible.

    python train.py --out DIR [--steps N] [--seed 0]
    python train.py --out DIR --eval-only
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
from conversations import Batch, Writer, check_writer
from evaluation import evaluate
from language import ASSISTANT, SYSTEM, USER
from muon import Muon
from network import make_model
from tokenizer import check_tokenizer, make_tokenizer
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3ForCausalLM

# (share of the steps, [(tokens per row, rows)]): one entry is chosen per step.  Short rows first,
# because the look-up is learned fastest there; long ones last, because attention has to be
# sharpened against thousands of competing tokens.
SCHEDULE: tuple[tuple[float, tuple[tuple[int, int], ...]], ...] = (
    (0.30, ((128, 32),)),
    (0.25, ((256, 16), (512, 8))),
    (0.25, ((128, 32), (512, 8), (1024, 4), (2048, 2))),
    (0.20, ((256, 16), (1024, 4), (2048, 2), (4096, 2))),
)

# What a continued training sees: every length at once, up to the longest, and smaller steps.
FINISH: tuple[tuple[float, tuple[tuple[int, int], ...]], ...] = (
    (1.00, ((128, 32), (256, 16), (256, 16), (512, 8), (1024, 4), (1024, 4), (2048, 2),
            (2048, 2), (4096, 1), (4096, 1), (8192, 1))),
)  # fmt: skip
FINISH_FACTOR = 0.4


# Peak learning rates, and the steps to get there.  The norm weights include those of queries and
# keys, which set how sharp attention can be; they have the furthest to go.
MUON_LR = 0.01
EMBED_LR = 3e-3
NORM_LR = 1e-2
WARMUP = 20


def shapes_at(
    schedule: tuple[tuple[float, tuple[tuple[int, int], ...]], ...], progress: float
) -> tuple[tuple[int, int], ...]:
    """The batch shapes in use when this share of the training is done."""
    for share, shapes in schedule:
        progress -= share
        if progress < 0:
            return shapes
    return schedule[-1][1]


def hidden_loss(model: Qwen3ForCausalLM, batch: Batch) -> tuple[Tensor, Tensor]:
    """Loss and accuracy over the assistant's tokens only.

    The mask is given as "plain causal" explicitly: left to itself the library would take the
    jumps in the positions for borders between packed sequences.
    """
    hidden = model.model(
        input_ids=batch.ids[:, :-1],
        position_ids=batch.positions[:, :-1],
        attention_mask={"full_attention": None},
        use_cache=False,
    ).last_hidden_state
    wanted = batch.trained[:, 1:]
    logits = model.lm_head(hidden[wanted])
    target = batch.ids[:, 1:][wanted]
    accuracy = (logits.detach().argmax(-1) == target).float().mean()
    return functional.cross_entropy(logits, target), accuracy


def train(
    model: Qwen3ForCausalLM, writer: Writer, steps: int, seed: int, out: Path, resumed: bool
) -> float:
    """Train in place; returns the seconds it took."""
    rng = random.Random(f"continued {seed}" if resumed else seed)
    schedule = FINISH if resumed else SCHEDULE
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    norms = [p for p in model.parameters() if p.ndim == 1]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, lr=MUON_LR),
        torch.optim.Adam(model.model.embed_tokens.parameters(), lr=EMBED_LR, betas=(0.9, 0.98)),
        torch.optim.Adam(norms, lr=NORM_LR, betas=(0.9, 0.98)),
    ]
    peaks = [MUON_LR, EMBED_LR, NORM_LR]
    if resumed:
        peaks = [FINISH_FACTOR * peak for peak in peaks]
    started = time.monotonic()
    seen = 0
    for step in range(steps):
        factor = min(1.0, (step + 1) / WARMUP)
        progress = step / steps
        factor *= 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
        length, rows = rng.choice(shapes_at(schedule, progress))
        batch = Batch.make(writer, rng, rows, length)
        loss, accuracy = hidden_loss(model, batch)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seen += batch.ids.numel()
        if step % 10 == 0 or step == steps - 1:
            print(
                f"step {step:5d}/{steps} length {length:4d} loss {loss.item():.4f} "
                f"accuracy {accuracy.item():.4f} tokens {seen / 1e6:.1f}M "
                f"{time.monotonic() - started:.0f}s",
                flush=True,
            )
        if step and step % 100 == 0:
            save(model, writer.tokenizer, out)
    return time.monotonic() - started


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the five files, readable for both the current and the previous library generation."""
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out, save_jinja_files=False)
    (out / "model.safetensors").chmod(0o644)

    rope_theta = model.config.rope_parameters["rope_theta"]
    edit_json(out / "config.json", {"torch_dtype": "float32", "rope_theta": rope_theta})
    edit_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "additional_special_tokens": [SYSTEM, USER, ASSISTANT],
        },
        drop=("backend", "extra_special_tokens"),
    )
    # Greedy is what the answers are measured with, so greedy is the default.
    generation = {
        "do_sample": False,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def edit_json(path: Path, entries: dict[str, object], drop: tuple[str, ...] = ()) -> None:
    """Set and drop entries of a JSON object in a file."""
    content = {k: v for k, v in json.loads(path.read_text()).items() if k not in drop} | entries
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def main() -> None:
    """Train and measure, or only measure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="where the model goes")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--eval-only", action="store_true", help="measure what is in --out")
    parser.add_argument(
        "--resume", action="store_true", help="train the model in --out further, on all lengths"
    )
    parser.add_argument(
        "--eval-scale", type=float, default=1.0, help="share of the evaluation cases to run"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not options.eval_only:
        torch.manual_seed(options.seed)
        tokenizer = make_tokenizer()
        check_tokenizer(tokenizer)
        writer = Writer(tokenizer)
        check_writer(writer, options.seed)
        if options.resume:
            model = AutoModelForCausalLM.from_pretrained(options.out)
        else:
            model = make_model(tokenizer)
        print(f"{len(tokenizer)} tokens, {sum(p.numel() for p in model.parameters())} parameters")
        seconds = train(model, writer, options.steps, options.seed, options.out, options.resume)
        save(model, tokenizer, options.out)
        print(f"trained in {seconds / 60:.1f} minutes")
    evaluate(options.out, options.seed, options.eval_scale)


if __name__ == "__main__":
    main()
