"""What a manifest asks for that its model cannot give. Pure: no reading of models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from penstock_operator.errors import Problem

if TYPE_CHECKING:
    from penstock_operator.api import InferenceService


def model_problems(service: InferenceService, config: dict[str, Any]) -> list[Problem]:
    """Return why this model cannot be divided or run as asked; `config` is its config.json."""
    spec = service.spec
    text = config.get("text_config")
    config = text if isinstance(text, dict) else config
    problems = []
    layers = config.get("num_hidden_layers")
    stages = spec.prefill.pipeline_parallel if spec.prefill else 1
    if isinstance(layers, int) and stages > layers:
        problems.append(
            Problem(
                "spec.prefill.pipelineParallel",
                f"{stages} stages cannot share {layers} layers: every stage holds at least one; "
                f"use at most {layers}",
            )
        )
    dealt = spec.prefill.layers_per_stage if spec.prefill else None
    if isinstance(layers, int) and dealt is not None and sum(dealt) != layers:
        problems.append(
            Problem(
                "spec.prefill.layersPerStage",
                f"{sum(dealt):g} layers in all, the model has {layers}",
            )
        )
    for role, part in (("prefill", spec.prefill), ("decode", spec.decode)):
        if part is not None:
            problems += _head_problems(role, part.tensor_parallel, config)
    longest, asked = config.get("max_position_embeddings"), spec.model.max_model_len
    if isinstance(longest, int) and asked is not None and asked > longest:
        problems.append(
            Problem(
                "spec.model.maxModelLen",
                f"{asked} is more than the {longest} positions that the model was made for "
                "(max_position_embeddings)",
            )
        )
    return problems


def _head_problems(role: str, ranks: int, config: dict[str, Any]) -> list[Problem]:
    """Every rank holds whole query heads and, unless they are shared, whole KV heads."""
    path = f"spec.{role}.tensorParallel"
    heads = config.get("num_attention_heads")
    kv_heads = config.get("num_key_value_heads", heads)
    if isinstance(heads, int) and heads % ranks:
        return [Problem(path, f"{ranks} does not divide the model's {heads} attention heads")]
    if isinstance(kv_heads, int) and kv_heads % ranks and ranks % kv_heads:
        return [
            Problem(
                path,
                f"{ranks} neither divides the model's {kv_heads} key/value heads nor is a multiple "
                "of them, so they cannot be dealt out evenly",
            )
        ]
    return []
