"""Which files of a Hugging Face folder hold the weights."""

from __future__ import annotations

from pathlib import Path

from nano_vllm.weights.json_file import read_json_object

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def weight_files(folder: Path) -> dict[Path, list[str] | None]:
    """Each safetensors file of a model -> what its index places there, None for all it holds.

    ValueError names the file that is missing.
    """
    if (folder / INDEX).exists():
        return _read_index(folder)
    if (folder / SINGLE).exists():
        return {folder / SINGLE: None}
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return {found[0]: None}
    if found:
        raise ValueError(f"{folder} has {len(found)} .safetensors files but no {INDEX}")
    if next(folder.glob("*.bin"), None) or next(folder.glob("*.pt*"), None):
        raise ValueError(
            f"{folder} has only pickled weights, which are never loaded: use safetensors"
        )
    raise ValueError(f"{folder} has no weights: {SINGLE} or {INDEX} is needed")


def _read_index(folder: Path) -> dict[Path, list[str] | None]:
    weight_map = read_json_object(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{folder / INDEX}: weight_map must be an object of tensor and file names")
    files: dict[Path, list[str] | None] = {}
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or Path(file_name).name != file_name:
            raise ValueError(
                f"{folder / INDEX}: tensor {name!r} must be in a file beside it, got {file_name!r}"
            )
        path = folder / file_name
        if path not in files and not path.exists():
            raise ValueError(f"{path} is missing: {INDEX} places tensor {name!r} there")
        names = files.setdefault(path, [])
        assert names is not None
        names.append(name)
    return files
