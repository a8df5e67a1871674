"""What a manifest asks for that cannot be given. Pure: reasons, no reading of models.

`unavailable` needs the manifest alone, `model_problems` the checkpoint's config.json as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from penstock_operator.errors import Problem

if TYPE_CHECKING:
    from penstock_operator.api import InferenceService

AVAILABLE_SCHEMES = ("file", "hf", "pvc")


def unavailable(service: InferenceService) -> list[Problem]:
    """Return what the schema has a place for but this release cannot do yet."""
    spec = service.spec
    problems = []
    for role, part in (("prefill", spec.prefill), ("decode", spec.decode)):
        if part is not None and part.tensor_parallel > 1:
            problems.append(
                Problem(
                    f"spec.{role}.tensorParallel",
                    f"{part.tensor_parallel} is not available yet: a worker computes on one "
                    "device; use 1, and prefill.pipelineParallel to spread the layers",
                )
            )
    if spec.model.scheme not in AVAILABLE_SCHEMES:
        known = ", ".join(f"{scheme}://" for scheme in AVAILABLE_SCHEMES)
        problems.append(
            Problem(
                "spec.model.uri",
                f"{spec.model.scheme}:// is not available yet; this release reads {known}",
            )
        )
    if spec.device == "cuda" and not spec.decode.resources.gpu:
        problems.append(
            Problem("spec.decode.resources.gpu", "device cuda needs at least 1 GPU a worker")
        )
    if spec.device == "cuda" and spec.prefill and not spec.prefill.resources.gpu:
        problems.append(
            Problem("spec.prefill.resources.gpu", "device cuda needs at least 1 GPU a worker")
        )
    return problems


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
