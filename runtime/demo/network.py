"""The demo's network, and the state in which its training starts."""

from __future__ import annotations

import torch
from language import MAX_POSITIONS
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """About 0.9 million parameters.

    The very large rope_theta leaves more than half of each head's dimensions practically without
    rotation over 8,192 positions.  Looking up a word needs content that does not depend on
    distance; looking two tokens back uses the few fast dimensions.
    """
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e10},
        initializer_range=0.03,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = Qwen3ForCausalLM(config)
    give_a_head_start(model)
    return model


@torch.no_grad()
def give_a_head_start(model: Qwen3ForCausalLM) -> None:
    """Start the first two layers near the look-up they are going to learn.

    A fact is found by an "induction" circuit: one layer notes next to every token which token
    stood one and two places before it, the next layer looks for the place whose note matches.
    Found by chance from random weights this takes most of the training, because neither layer
    is of use without the other.  So the heads of layer 0 begin as heads that look one and two
    tokens back, and those of layer 1 as heads that compare the two notes and copy.  Training
    moves all of it; layers 2 and 3, which decide what the request is, start at random.
    """
    config = model.config
    width, size = config.hidden_size, config.head_dim
    first, second = model.model.layers[0].self_attn, model.model.layers[1].self_attn
    half = size // 2
    frequency = config.rope_parameters["rope_theta"] ** (-torch.arange(half) / half)

    # A direction that all embeddings share stands in for the missing bias of the projections.
    shared = torch.zeros(width)
    shared[-1] = 1.0
    embedding = model.model.embed_tokens.weight
    embedding.copy_(torch.randn_like(embedding) / width**0.5)
    embedding[:, -1] = 0.6

    # Layer 0, first key/value head: its two query heads look at fixed distances 1 and 2.
    fast = 4
    first.q_norm.weight.fill_(1.6)
    first.k_norm.weight.fill_(1.6)
    key = torch.zeros(size)
    key[:fast] = fast**-0.5
    first.k_proj.weight[:size] *= 0.4
    first.k_proj.weight[:size] += torch.outer(key, shared)
    for head, distance in enumerate((1, 2)):
        angle = -distance * frequency[:fast]
        query = torch.zeros(size)
        query[:fast], query[half : half + fast] = angle.cos(), angle.sin()
        rows = slice(head * size, (head + 1) * size)
        first.q_proj.weight[rows] *= 0.4
        first.q_proj.weight[rows] += torch.outer(query * fast**-0.5, shared)
    notes = torch.linalg.qr(torch.randn(width, width)).Q
    first.v_proj.weight[:size] = torch.linalg.qr(torch.randn(width, size)).Q.T
    first.v_proj.weight[:size, -1] = 0.0
    first.o_proj.weight[:, :size] = 0.22 * notes[:, :size]
    first.o_proj.weight[:, size : 2 * size] = 0.22 * notes[:, size:]

    # Layer 1: compare note "one back" here with note "two back" there, in the dimensions that
    # rotate too slowly to disturb the comparison, and copy the token found.
    second.q_norm.weight.fill_(1.6)
    second.k_norm.weight.fill_(1.6)
    slow = (frequency < 2e-4).nonzero().flatten()
    slow = torch.cat([slow, slow + half])
    basis = torch.linalg.qr(torch.randn(width, width)).Q
    for group in range(2):
        mixing = torch.zeros(size, size)
        mixing[slow] = torch.linalg.qr(torch.randn(size, len(slow))).Q.T
        copied = basis[:, group * size : (group + 1) * size]
        rows = slice(group * size, (group + 1) * size)
        second.k_proj.weight[rows] = mixing @ notes[:, size:].T
        second.v_proj.weight[rows] = copied.T
        for head in (2 * group, 2 * group + 1):
            rows = slice(head * size, (head + 1) * size)
            second.q_proj.weight[rows] = mixing @ notes[:, :size].T
            second.o_proj.weight[:, rows] = 0.4 * copied
