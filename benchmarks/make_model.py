"""Writes the model that the benchmarks run: shaped like Qwen3, 210M parameters, random weights.

    hidden 1024, 16 layers, 16 query and 8 KV heads of 64, feed-forward 3072, tied embeddings,
    vocabulary 8192, bfloat16

Weights are normal with the deviation that transformers starts a Qwen3 with, from a fixed seed: the
speed of a model does not depend on what it says. Every model smaller than this one would measure
the Python around it instead.

The tokenizer is byte-level BPE, trained on Python's own standard library, so nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

from common import CACHE, say

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

DIRECTORY = CACHE / "qwen3-210m"
VOCABULARY = 8192
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Ids 0, 1 and 2. Benchmarks draw prompts from the ids behind them."""
INITIAL_DEVIATION = 0.02
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "dtype": "bfloat16",
    "vocab_size": VOCABULARY,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "hidden_act": "silu",
    "attention_bias": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "max_position_embeddings": 65536,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 2,
}
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def ensure_model(directory: Path = DIRECTORY) -> Path:
    """Return the directory of the model, written now unless it is there."""
    if not (directory / "config.json").exists():
        say(f"writing the model to {directory}")
        directory.mkdir(parents=True, exist_ok=True)
        _write_tokenizer(directory)
        _write_weights(directory, seed=0)
        # Last, as the sign that all is there.
        (directory / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    return directory


def shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name and shape of every tensor."""
    hidden, ff, head = 1024, 3072, 64
    queries, keys = 16 * head, 8 * head
    yield "model.embed_tokens.weight", (VOCABULARY, hidden)
    for index in range(16):
        layer = f"model.layers.{index}."
        yield layer + "input_layernorm.weight", (hidden,)
        yield layer + "self_attn.q_proj.weight", (queries, hidden)
        yield layer + "self_attn.k_proj.weight", (keys, hidden)
        yield layer + "self_attn.v_proj.weight", (keys, hidden)
        yield layer + "self_attn.o_proj.weight", (hidden, queries)
        yield layer + "self_attn.q_norm.weight", (head,)
        yield layer + "self_attn.k_norm.weight", (head,)
        yield layer + "post_attention_layernorm.weight", (hidden,)
        yield layer + "mlp.gate_proj.weight", (ff, hidden)
        yield layer + "mlp.up_proj.weight", (ff, hidden)
        yield layer + "mlp.down_proj.weight", (hidden, ff)
    yield "model.norm.weight", (hidden,)


def _write_weights(directory: Path, seed: int) -> None:
    import torch  # noqa: PLC0415 - other benchmarks import this module without torch
    from safetensors.torch import save_file  # noqa: PLC0415

    generator = torch.Generator().manual_seed(seed)

    def make(shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        values = torch.randn(shape, generator=generator) * INITIAL_DEVIATION
        return values.to(torch.bfloat16)

    tensors = {name: make(shape) for name, shape in shapes()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    count = sum(tensor.numel() for tensor in tensors.values())
    say(f"{count / 1e6:.0f}M parameters, seed {seed}")


def _write_tokenizer(directory: Path) -> None:
    from tokenizers import (  # noqa: PLC0415
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        trainers,
    )

    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:120]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(file) for file in files], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL_TOKENS[2],
        "pad_token": SPECIAL_TOKENS[0],
        "chat_template": CHAT_TEMPLATE,
        "model_max_length": CONFIG["max_position_embeddings"],
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(described, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=DIRECTORY, help=f"where to write it (default: {DIRECTORY})"
    )
    print(ensure_model(parser.parse_args().out))


if __name__ == "__main__":
    main()
