"""Copy a model folder with a few tensors replaced in place, so that nothing else in it can change."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig

from axolotl_plugins.common.io import load_json
from axolotl_plugins.common.window import read_config

from .model_loading import BROKEN, WRITER_KEYS
from .provenance import FILE as TRAINING_DATA

Change = Callable[[torch.Tensor], torch.Tensor]  # of a tensor of the files
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# Files of a model folder that are not copied: weights in other formats, which would stay without scales, and notes.
OTHER_WEIGHTS = (
    ".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".ot",
)  # fmt: skip
NOT_COPIED = ("README.md", "adapter_config.json", "trainer_state.json", TRAINING_DATA)
TOKENIZER_FILES = ("tokenizer", "special_tokens_map", "added_tokens", "chat_template")  # how their names start
# Transformers 4's keys of RoPE's base in full and in sliding attention, where they are not these.
OLDER_THETA = ("rope_theta", "rope_local_base_freq")
OTHER_OLDER_THETA = {
    "gpt_neox": ("rotary_emb_base", ""), "gpt_neox_japanese": ("rotary_emb_base", ""),
    "modernbert-decoder": ("global_rope_theta", "local_rope_theta"),
}  # fmt: skip


class Place(NamedTuple):
    """A tensor in the files of a model folder."""

    file: str
    name: str


def model_folder(name: str | Path) -> Path:
    """Return the folder of a model: itself, or the local snapshot of a hub id."""
    from huggingface_hub import snapshot_download

    return Path(name) if Path(name).is_dir() else Path(snapshot_download(str(name), local_files_only=True))


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that Transformers loads from a folder.

    Raises:
        ValueError: there are none.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        return [folder / name for name in sorted(set(load_json(folder / INDEX)["weight_map"].values()))]
    raise ValueError(f"{folder}: has neither {WEIGHTS} nor {INDEX}: save the model as safetensors")


def other_files(folder: Path) -> Iterator[Path]:
    """Yield the files to copy beside the weights: configs, tokenizer, chat templates, code, licence."""
    if (folder / INDEX).is_file() and not (folder / WEIGHTS).is_file():
        yield folder / INDEX
    for file in sorted([*folder.iterdir(), *folder.glob("additional_chat_templates/*")]):
        skipped = file.name.startswith(".") or file.name.endswith(OTHER_WEIGHTS) or file.name in NOT_COPIED
        if file.is_file() and not skipped:
            yield file


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """Return the header of a safetensors file, and the offset in bytes at which its tensors begin."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        return json.loads(stream.read(size)), 8 + size


def shared_ending(first: str, second: str) -> int:
    """Return how many dotted parts two names have in common at their ends."""
    pairs = zip(reversed(first.split(".")), reversed(second.split(".")), strict=False)
    return next((count for count, (a, b) in enumerate(pairs) if a != b), min(first.count("."), second.count(".")) + 1)


def find_tensors(folder: Path, parameters: dict[str, torch.Tensor]) -> dict[str, Place]:
    """Find a loaded model's parameters (name -> values as loaded) in the files that it was loaded from.

    Files may have other names for them, so a tensor is recognised by its values; of several that are equal, the one
    with the most similar name is taken.

    Returns:
        Name in the model -> tensor in the files; parameters that the files hold in another form are left out.
    """
    places: dict[str, Place] = {}
    shapes: dict[tuple[int, ...], list[Place]] = {}
    for file in weight_files(folder):
        for name, info in read_header(file)[0].items():
            if name != "__metadata__":
                shapes.setdefault(tuple(info["shape"]), []).append(Place(file.name, name))
    for name, values in parameters.items():
        candidates = shapes.get(tuple(values.shape), [])
        for place in sorted(candidates, key=lambda place: -shared_ending(place.name, name)):
            if torch.equal(read_tensor(folder, place).to(values.dtype), values.cpu()):
                places[name] = place
                break
    return places


def read_tensor(folder: Path, place: Place) -> torch.Tensor:
    """Read one tensor of a model folder."""
    with safe_open(folder / place.file, "pt") as tensors:
        return tensors.get_tensor(place.name)


def times(factor: torch.Tensor) -> Change:
    """Return the change of a tensor to its product with a factor, computed in float32 or wider, in its own dtype."""
    return lambda tensor: (tensor.to(torch.promote_types(tensor.dtype, torch.float32)) * factor).to(tensor.dtype)


def changed_tensor(folder: Path, place: Place, change: Change) -> torch.Tensor:
    """Return what a change makes of a tensor of the files.

    Raises:
        ValueError: it overflows the dtype.
    """
    tensor = change(read_tensor(folder, place))
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{place.name}: scaled values overflow {tensor.dtype}: train again at a lower learning rate")
    return tensor


def tensor_bytes(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor's values as they lie in a file."""
    return tensor.contiguous().view(torch.uint8).flatten().numpy()


def copy_model(folder: Path, out: Path, changes: dict[Place, Change | None]) -> None:
    """Copy a model folder to a new one with some tensors changed, or left out where the change is None.

    Memory holds one of them at a time; of files in which a size changes, all tensors.

    Raises:
        ValueError: a changed tensor overflows its dtype.
    """
    out.mkdir()
    for file in [*weight_files(folder), *other_files(folder)]:
        target = out / file.relative_to(folder)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)
    resized: dict[str, dict[str, torch.Tensor | None]] = {}
    for place, change in changes.items():
        header, offset = read_header(out / place.file)
        begin, end = header[place.name]["data_offsets"]
        tensor = None if change is None else changed_tensor(folder, place, change)
        if tensor is None or tensor.nbytes != end - begin:
            resized.setdefault(place.file, {})[place.name] = tensor
            continue
        with (out / place.file).open("r+b") as stream:
            stream.seek(offset + begin)
            stream.write(tensor_bytes(tensor).tobytes())
    for name, tensors in resized.items():
        replace_tensors(out / name, tensors)


def replace_tensors(file: Path, changed: dict[str, torch.Tensor | None]) -> None:
    """Write a safetensors file of a model folder with some tensors replaced, or left out where they are None."""
    with safe_open(file, "pt") as source:
        tensors = {name: source.get_tensor(name) for name in source.keys()} | changed  # noqa: SIM118
        metadata = source.metadata()
    left_out = {name for name, tensor in changed.items() if tensor is None}
    partial = file.with_suffix(".partial")
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, partial, metadata)
    partial.replace(file)
    if (path := file.parent / INDEX).is_file():
        index = load_json(path)
        index["weight_map"] = {name: at for name, at in index["weight_map"].items() if name not in left_out}
        path.write_text(json.dumps(index, indent=2) + "\n")


def check_copy(folder: Path, copy: Path, changes: dict[Place, Change | None]) -> int:
    """Compare every tensor that ``copy_model`` wrote into ``copy``, byte by byte; return their number in ``folder``.

    Raises:
        ValueError: a tensor differs from the original in ``folder``, or its change; the message names it.
    """
    count = 0
    for file in weight_files(folder):
        (header, offset), (saved_header, saved_offset) = read_header(file), read_header(copy / file.name)
        left_out = {place.name for place, change in changes.items() if place.file == file.name and change is None}
        metadata = header.pop("__metadata__", None)
        if metadata != saved_header.pop("__metadata__", None) or saved_header.keys() != header.keys() - left_out:
            raise ValueError(f"{copy / file.name}: has other tensors than {file}: merge again")
        data = np.memmap(file, np.uint8, "r", offset=offset)
        saved = np.memmap(copy / file.name, np.uint8, "r", offset=saved_offset)
        for name, info in saved_header.items():
            place = Place(file.name, name)
            if change := changes.get(place):
                expected, found = changed_tensor(folder, place, change), read_tensor(copy, place)
                same = (found.dtype, found.shape) == (expected.dtype, expected.shape)
                same = same and np.array_equal(tensor_bytes(found), tensor_bytes(expected))
            else:
                at, saved_at = (slice(*each.pop("data_offsets")) for each in (header[name], info))
                same = info == header[name] and np.array_equal(saved[saved_at], data[at])
            if not same:
                raise ValueError(f"{copy}: {name} differs from a merge into {folder}: merge again")
        count += len(header)
    return count


def overlay(raw: dict[str, Any], old: dict[str, Any], new: dict[str, Any]) -> None:
    """Set the keys of a config file that differ between two configs; nested configs are compared key by key."""
    for key, value in new.items():
        if old.get(key) == value:
            continue
        if key.endswith("_config") and isinstance(value, dict) and isinstance(old.get(key), dict):
            overlay(raw.setdefault(key, {}), old[key], value)
        else:
            raw[key] = value
            if key == "rope_parameters":  # which the older keys would contradict
                for theta in (OLDER_THETA, *OTHER_OLDER_THETA.values()):
                    for name in ("rope_scaling", "rotary_pct", "partial_rotary_factor", *theta):
                        raw.pop(name, None)


def add_older_rope_keys(config: dict[str, Any]) -> None:
    """Add the RoPE keys that Transformers 4 reads to a config that has Transformers 5's ``rope_parameters``."""
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return
    model_type = config.get("model_type")
    full_theta, sliding_theta = OTHER_OLDER_THETA.get(str(model_type), OLDER_THETA)
    if sliding := rope.get("sliding_attention"):
        config.setdefault(sliding_theta, sliding.get("rope_theta"))
        rope = rope.get("full_attention") or {}
    if "rope_theta" not in rope:
        return
    config.setdefault(full_theta, rope["rope_theta"])
    if (share := rope.get("partial_rotary_factor")) is not None:
        config.setdefault("rotary_pct" if full_theta == "rotary_emb_base" else "partial_rotary_factor", share)
    if rope.get("rope_type", "default") != "default":
        scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
        if rope["rope_type"] == "longrope":
            config.setdefault("original_max_position_embeddings", rope["original_max_position_embeddings"])
        if model_type in ("phi3", "phi4_multimodal"):  # which take these three keys only, and derive the factor
            ratio = config["max_position_embeddings"] / (rope.get("original_max_position_embeddings") or 1)
            if rope["rope_type"] != "longrope" or rope.get("factor", ratio) != ratio:
                return
            scaling = {"type": "longrope", **{key: rope[key] for key in ("short_factor", "long_factor")}}
        config.setdefault("rope_scaling", scaling)


def meaning(config: Any) -> Any:
    """Return a config as a dict without the keys that depend on how it was written."""
    if not isinstance(config, dict):
        return config
    return {key: meaning(value) for key, value in config.items() if key not in WRITER_KEYS}


def without_derived(config: Any) -> Any:
    """Return a config without the keys of LongRoPE that follow from others: its factor and its type's older name."""
    if not isinstance(config, dict):
        return config
    derived = ("factor", "type") if config.get("rope_type") == "longrope" else ()
    return {key: without_derived(value) for key, value in config.items() if key not in derived}


def write_config(folder: Path, source: Path, out: Path, **trust: bool) -> None:
    """Write the config of a copy: the original file, with the keys that the config in another folder changes.

    The other folder (``source``) may be an adapter's with a stretched window; ``trust`` may be ``trust_remote_code``.

    Raises:
        ValueError: the written config would not be read as the one in ``source``.
    """
    original = load_json(folder / "config.json")
    raw = json.loads(json.dumps(original))
    configs = AutoConfig.from_pretrained(folder, **trust), read_config(str(source), None, **trust)
    old, new = (meaning(config.to_dict()) for config in configs)
    overlay(raw, old, new)
    both = json.loads(json.dumps(raw))
    for part in (both, *(value for key, value in both.items() if key.endswith("_config") and isinstance(value, dict))):
        add_older_rope_keys(part)
    # Architectures that Transformers 4 never had do not read its keys.
    for config in (both, raw):
        if config == original:
            shutil.copyfile(folder / "config.json", out / "config.json")
        else:
            (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        try:
            written = without_derived(meaning(AutoConfig.from_pretrained(out, **trust).to_dict()))
        except BROKEN:
            continue
        if all(written.get(key) == value for key, value in without_derived(new).items()):
            return
    raise ValueError(f"{folder / 'config.json'}: cannot be written with the settings of {source / 'config.json'}")
