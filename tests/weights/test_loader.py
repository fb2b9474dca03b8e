from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from nano_vllm.config import ModelConfig
from nano_vllm.weights.loader import load_weights


class Joined(nn.Linear):
    """Two layers of two features each in one weight."""

    def __init__(self) -> None:
        super().__init__(3, 4, bias=False)
        self.weight.weight_loader = self.load  # type: ignore[assignment]

    def load(self, parameter: nn.Parameter, tensor: torch.Tensor, shard: str) -> None:
        target = parameter.data[:2] if shard == "left" else parameter.data[2:]
        if target.shape != tensor.shape:
            raise ValueError(f"{shard} must have shape {list(target.shape)}")
        target.copy_(tensor)


class Model(nn.Module):
    stacked: ClassVar = {"left_proj": ("both_proj", "left"), "right_proj": ("both_proj", "right")}

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.layers = nn.ModuleList([nn.ModuleDict({"both_proj": Joined()}) for _ in range(2)])
        self.norm = nn.RMSNorm(3)
        self.lm_head = nn.Linear(3, 5, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight


def config(tied: bool) -> ModelConfig:
    return ModelConfig(
        "X", 5, 3, 3, 2, 1, 1, 3, 8, 1e-5, 1e4, tie_word_embeddings=tied
    )  # fmt: skip


def tensors() -> dict[str, torch.Tensor]:
    made = {"embed.weight": torch.randn(5, 3), "norm.weight": torch.randn(3)}
    for layer in range(2):
        for side in ("left", "right"):
            made[f"layers.{layer}.{side}_proj.weight"] = torch.randn(2, 3)
    made["lm_head.weight"] = torch.randn(5, 3)
    return made


Save = Callable[[dict[str, torch.Tensor]], Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    def write(values: dict[str, torch.Tensor]) -> Path:
        save_file(values, tmp_path / "model.safetensors")
        return tmp_path

    return write


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inference", [False, True])
def test_every_parameter_is_filled(save: Save, dtype: torch.dtype, inference: bool) -> None:
    values = tensors()
    with torch.inference_mode(inference):
        model = Model(tied=False).to(dtype)
        for module in model.layers:
            module["both_proj"].weight.weight_loader = module["both_proj"].load
        load_weights(model, save(values), config(tied=False))
    assert torch.equal(model.embed.weight, values["embed.weight"].to(dtype))
    assert torch.equal(model.norm.weight, values["norm.weight"].to(dtype))
    assert torch.equal(model.lm_head.weight, values["lm_head.weight"].to(dtype))
    for i, layer in enumerate(model.layers):
        both = [values[f"layers.{i}.{side}_proj.weight"] for side in ("left", "right")]
        assert torch.equal(layer["both_proj"].weight, torch.cat(both).to(dtype))


@pytest.mark.parametrize("head", ["absent", "present"])
def test_tied_head(save: Save, head: str) -> None:
    values = tensors()
    if head == "absent":
        del values["lm_head.weight"]
    model = Model(tied=True)
    load_weights(model, save(values), config(tied=True))
    assert torch.equal(model.lm_head.weight, values["embed.weight"])


def test_untied_head_must_be_there(save: Save) -> None:
    values = tensors()
    del values["lm_head.weight"]
    with pytest.raises(ValueError, match=r"lacks tensors: lm_head\.weight$"):
        load_weights(Model(tied=False), save(values), config(tied=False))


def test_known_tensors_that_are_no_weights(save: Save) -> None:
    extra = {"layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    load_weights(Model(tied=False), save({**tensors(), **extra}), config(tied=False))


def test_missing_tensors_are_named_as_in_the_checkpoint(save: Save) -> None:
    values = tensors()
    del values["layers.1.right_proj.weight"], values["norm.weight"]
    with pytest.raises(ValueError, match=r"lacks tensors: layers\.1\.right_proj\.weight, norm"):
        load_weights(Model(tied=False), save(values), config(tied=False))


def test_leftover_tensors(save: Save) -> None:
    values = {**tensors(), **{f"layers.9.left_proj.{i}": torch.ones(1) for i in range(6)}}
    with pytest.raises(ValueError, match=r"unknown tensors: layers\.9\.left_proj\.0, .* 2 more$"):
        load_weights(Model(tied=False), save(values), config(tied=False))


def test_misshapen_tensor(save: Save) -> None:
    values = {**tensors(), "norm.weight": torch.ones(4)}
    with pytest.raises(ValueError, match=r"misshapen tensors: norm\.weight \[4\] instead of \[3\]"):
        load_weights(Model(tied=False), save(values), config(tied=False))


def test_misshapen_shard(save: Save) -> None:
    values = {**tensors(), "layers.0.left_proj.weight": torch.ones(3, 3)}
    with pytest.raises(ValueError, match=r"tensor 'layers\.0\.left_proj\.weight': left must have"):
        load_weights(Model(tied=False), save(values), config(tied=False))


def test_nothing_is_written_before_all_is_checked(save: Save) -> None:
    values = tensors()
    del values["norm.weight"]
    model = Model(tied=False)
    before = model.embed.weight.clone()
    with pytest.raises(ValueError, match="lacks"):
        load_weights(model, save(values), config(tied=False))
    assert torch.equal(model.embed.weight, before)


@pytest.mark.parametrize(("name", "wrong"), [("m.gguf", "safetensors"), ("folder", "gguf")])
def test_format_must_fit(tmp_path: Path, name: str, wrong: str) -> None:
    with pytest.raises(ValueError, match=f"load_format must be auto or .* got '{wrong}'"):
        load_weights(Model(tied=False), tmp_path / name, config(tied=False), load_format=wrong)


def dummy(seed: int) -> dict[str, torch.Tensor]:
    model = Model(tied=True)
    load_weights(model, Path("nowhere"), config(tied=True), load_format="dummy", seed=seed)
    return dict(model.named_parameters())


def test_dummy_weights_follow_the_seed() -> None:
    first, again, other = dummy(1), dummy(1), dummy(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embed.weight"], other["embed.weight"])
    assert torch.equal(first["norm.weight"], torch.ones(3))
    assert 0 < first["embed.weight"].abs().max() < 0.04
