"""config.json of every age is read alike, and what cannot be served is refused with its reason."""

from __future__ import annotations

import json

import pytest
import torch

from penstock_runtime.errors import ConfigurationError
from penstock_runtime.model.config import ModelConfig
from penstock_runtime.model.errors import ModelConfigError
from penstock_runtime.model.registry import ARCHITECTURES
from penstock_runtime.model.rope import RopeConfig

LLAMA2 = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float16",
    "eos_token_id": 2,
}
LLAMA31_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.fixture
def read(tmp_path):
    def read(**changes):
        fields = {key: value for key, value in (LLAMA2 | changes).items() if value is not ...}
        (tmp_path / "config.json").write_text(json.dumps(fields))
        return ModelConfig.from_directory(tmp_path)

    return read


def test_absent_fields_mean_what_they_meant_in_old_checkpoints(read):
    config = read()
    assert (config.kv_heads, config.head_dim, config.rope) == (32, 128, RopeConfig(theta=10000.0))
    assert (config.tied_embeddings, config.qkv_bias, config.qk_norm) == (False, False, False)
    assert (config.dtype, config.eos_token_ids) == (torch.float16, (2,))
    assert (config.max_context, config.max_context_reason) == (4096, "max_position_embeddings")


def test_old_and_new_rope_keys_mean_the_same(read):
    old = read(rope_theta=500000.0, rope_scaling=LLAMA31_ROPE)
    new = read(rope_parameters=LLAMA31_ROPE | {"rope_theta": 500000.0})
    assert old.rope == new.rope
    assert old.rope == RopeConfig(
        kind="llama3",
        theta=500000.0,
        factor=8.0,
        original_context=8192,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    )


def test_the_oldest_name_of_the_rope_type(read):
    assert read(rope_scaling={"type": "linear", "factor": 4.0}).rope == RopeConfig(
        kind="linear", factor=4.0
    )


def test_yarn_stretches_the_context_and_scales_attention(read):
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    config = read(rope_scaling=scaling)
    assert (config.max_context, config.max_context_reason) == (16384, "yarn's factor")
    assert config.rope.attention_factor == pytest.approx(1.1386294)
    given = read(rope_scaling=scaling | {"attention_factor": 0.9})
    assert given.rope.attention_factor == 0.9


@pytest.mark.parametrize(
    ("changes", "context"),
    [
        ({"architectures": ["MistralForCausalLM"], "sliding_window": None}, 32768),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 4096}, 4096),
        ({"architectures": ["LlamaForCausalLM"], "sliding_window": 4096}, 32768),
        ({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 4096}, 32768),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "sliding_window": 4096,
                "use_sliding_window": True,
                "max_window_layers": 28,
            },
            4096,
        ),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "sliding_window": 4096,
                "use_sliding_window": True,
                "max_window_layers": 32,
            },
            32768,
        ),
    ],
)
def test_a_window_in_use_bounds_the_context(read, changes, context):
    config = read(max_position_embeddings=32768, **changes)
    assert config.max_context == context
    config.require_context(context)
    with pytest.raises(ModelConfigError, match=f"allows {context}; ask for at most that"):
        config.require_context(context + 1)


def test_qwen3_has_a_head_dim_of_its_own(read):
    config = read(architectures=["Qwen3ForCausalLM"], hidden_size=1024)
    assert (config.head_dim, config.qk_norm) == (128, True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, ", ".join(sorted(ARCHITECTURES))),
        ({"architectures": ...}, "architectures is None"),
        ({"hidden_size": ...}, "hidden_size is missing"),
        ({"hidden_size": "4096"}, "hidden_size is '4096', expected an integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_key_value_heads": 5}, "must divide 32 heads"),
        ({"head_dim": 63}, "need an even one"),
        ({"hidden_act": "gelu"}, "only silu is supported"),
        ({"torch_dtype": "float8_e4m3fn"}, "supported are float32, bfloat16, float16"),
        ({"tie_word_embeddings": "yes"}, "expected true or false"),
        ({"rms_norm_eps": float("nan")}, "expected a positive number"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "supported are default, dynamic, linear"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling: factor is missing"),
        ({"rope_scaling": LLAMA31_ROPE | {"high_freq_factor": 1.0}}, "above low_freq_factor"),
        ({"rope_scaling": "linear"}, "expected an object"),
        ({"partial_rotary_factor": 0.5}, "only whole heads are rotated"),
        ({"eos_token_id": "</s>"}, "expected integers"),
    ],
)
def test_refused_with_field_and_reason(read, changes, message):
    with pytest.raises(ModelConfigError) as caught:
        read(**changes)
    assert message in str(caught.value)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"), [("{", "not valid JSON"), ("[]", "not a JSON object")]
)
def test_a_broken_file(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelConfigError, match=message):
        ModelConfig.from_directory(tmp_path)


def test_no_file_says_what_to_give(tmp_path):
    with pytest.raises(ConfigurationError, match="give a directory in Hugging Face format"):
        ModelConfig.from_directory(tmp_path)


def test_kv_layout_of_a_stage_and_its_digest(read):
    config = read(num_key_value_heads=8)
    layout = config.kv_layout(layers=(8, 16), page_size=32, dtype=torch.bfloat16)
    assert layout.shape(10) == (10, 8, 2, 8, 32, 128)
    assert layout.page_bytes == 8 * 2 * 8 * 32 * 128 * 2
    digests = {
        config.kv_layout_digest(page_size=32, dtype=torch.bfloat16),
        config.kv_layout_digest(page_size=64, dtype=torch.bfloat16),
        config.kv_layout_digest(page_size=32, dtype=torch.float16),
        read(num_key_value_heads=4).kv_layout_digest(page_size=32, dtype=torch.bfloat16),
    }
    assert len(digests) == 4
