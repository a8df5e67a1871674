"""Checkpoints: only what is asked for is read, and what is wrong is named."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from penstock_runtime.model.config import ModelConfig
from penstock_runtime.model.errors import WeightsError
from penstock_runtime.model.transformer import Transformer
from penstock_runtime.model.weights import Checkpoint, model_digest

from .checkpoints import CONFIGS, save


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    save(CONFIGS["qwen3"], path)
    return path


@pytest.fixture
def directory(saved, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(saved, tmp_path / "model")


def load(path, layers=(0, 4), *, embed=True, head=True, progress=None):
    return Transformer.load(
        path,
        ModelConfig.from_directory(path),
        layers=layers,
        embed=embed,
        head=head,
        dtype=torch.float32,
        device=torch.device("cpu"),
        progress=progress,
    )


def rewrite(path, change) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def test_a_stage_reads_only_its_own_tensors(directory):
    tensors = load_file(directory / "model.safetensors")
    own = {name: t for name, t in tensors.items() if name.startswith("model.layers.2.")}
    rewrite(directory, lambda t: [t.pop(name) for name in tensors if name not in own])
    reports = []
    stage = load(
        directory, (2, 3), embed=False, head=False, progress=lambda *done: reports.append(done)
    )
    total = sum(tensor.nbytes for tensor in own.values())
    assert stage.num_layers == 1
    assert len(reports) == len(own)
    assert reports[-1] == (total, total)
    assert [done for done, _ in reports] == sorted({done for done, _ in reports})


def test_a_border_within_a_layer_divides_its_tensors(directory):
    tensors = load_file(directory / "model.safetensors")
    layer = [name for name in tensors if name.startswith("model.layers.2.")]
    second = [name for name in layer if ".mlp." in name or "post_attention_layernorm" in name]
    assert 0 < len(second) < len(layer)

    def read(layers):
        reports = []
        stage = load(
            directory, layers, embed=False, head=False, progress=lambda *done: reports.append(done)
        )
        return stage.num_layers, len(reports)

    assert read((2, 3)) == (1, len(layer))
    assert read((2, 2.5)) == (1, len(layer) - len(second))
    assert read((2.5, 4)) == (1, len(second) + len(layer))


def test_missing_tensors_are_named_before_anything_is_read(directory):
    rewrite(directory, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    reports = []
    with pytest.raises(WeightsError, match=r"lacks 1 tensors .*layers\.1\.mlp\.up_proj\.weight"):
        load(directory, progress=lambda *done: reports.append(done))
    assert reports == []
    load(directory, (2, 4))


def test_a_missing_head_is_named(directory):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    load(directory, head=False)
    with pytest.raises(WeightsError, match=r"lm_head\.weight"):
        load(directory)


def test_a_wrong_shape_names_tensor_file_and_both_shapes(directory):
    def shrink(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:7].clone()

    rewrite(directory, shrink)
    with pytest.raises(WeightsError, match=r"model\.norm\.weight in .* \(7,\), but .* \(48,\)"):
        load(directory)


def test_weights_are_our_own_copy(directory):
    """The file may vanish or change once it was loaded."""
    model = load(directory)
    tokens = torch.arange(9)
    before = model.embed(tokens).clone()
    with (directory / "model.safetensors").open("r+b") as file:
        file.truncate(0)
    assert torch.equal(model.embed(tokens), before)


@pytest.mark.parametrize("layers", [(0, 5), (2, 2), (-1, 2), (3, 1), (2.5, 3)])
def test_layers_outside_the_model(saved, layers):
    with pytest.raises(ValueError, match="of a model with 4"):
        load(saved, layers)


def test_a_border_is_at_a_layer_or_at_its_half(saved):
    with pytest.raises(ValueError, match=r"layers \[0, 2.25\): a border is at"):
        load(saved, (0, 2.25))


def cut_off(path):
    data = path.read_bytes()
    path.write_bytes(data[:-100])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), r"has no \*\.safetensors file"),
        (cut_off, "is cut off"),
        (lambda path: path.write_bytes(b"\x10" + bytes(7) + b"not json at all!"), "malformed"),
        (lambda path: path.write_bytes(b"\xff" * 64), "not a safetensors file"),
        (lambda path: path.write_bytes(b"\x02" + bytes(7) + b"[]"), "malformed"),
        (lambda path: path.write_bytes(b""), "malformed"),
    ],
)
def test_a_broken_file_is_refused(directory, spoil, message):
    spoil(directory / "model.safetensors")
    with pytest.raises(WeightsError, match=message):
        Checkpoint(directory)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", 7])
def test_an_index_cannot_lead_elsewhere(directory, name):
    index = {"weight_map": {"model.norm.weight": name}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="only files beside it are read"):
        Checkpoint(directory)


def test_an_index_that_names_a_missing_shard(directory):
    index = {"weight_map": {"model.norm.weight": "gone.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=r"cannot read .*gone\.safetensors"):
        Checkpoint(directory)


def test_the_digest_is_of_content_not_of_place(saved, directory):
    assert model_digest(directory) == model_digest(saved)


def scale(name):
    def change(tensors):
        tensors[name] *= 1.01

    return change


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: rewrite(path, scale("model.layers.3.self_attn.k_norm.weight")),
        lambda path: rewrite(path, lambda t: t.pop("model.norm.weight")),
        lambda path: (path / "config.json").write_text(
            (path / "config.json").read_text().replace("512", "1024")
        ),
    ],
    ids=["one tensor scaled", "one tensor less", "config changed"],
)
def test_the_digest_tells_models_apart(saved, directory, spoil):
    spoil(directory)
    assert model_digest(directory) != model_digest(saved)
