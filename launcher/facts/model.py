"""The shape and the files of a model, from its folder or the Hub cache.

Decides whether a folder can be trained from, and what it holds. It reads config.json,
the tokenizer's settings and the headers of weight files; it must not load weights,
import transformers, or open a network connection.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import SpecError
from launcher.facts.families import Config, Dimensions, Shape, missing_keys, read_shape

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
_WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")
# Files that lie beside the weights and are none of them.
_NOT_WEIGHTS = ("adapter_model", "consolidated", "training_args")
_HEADER_LENGTH_BYTES = 8
_LARGEST_HEADER_BYTES = (
    100_000_000  # safetensors refuses larger ones: src/tensor.rs, MAX_HEADER_SIZE
)


@dataclass(frozen=True, kw_only=True)
class ModelFacts(Dimensions):
    """What the files of one model say about it."""

    path: str
    """The name or path as the user gave it."""

    architecture: str
    """First of `architectures` in config.json, for example `LlamaForCausalLM`; may be empty."""

    model_type: str
    """`model_type` of config.json, of its text part where the model has more parts."""

    max_position_embeddings: int | None
    """Longest sequence that config.json promises; None where it says nothing."""

    tie_word_embeddings: bool
    """Whether `lm_head` is the embedding."""

    parameters: int
    """All parameters; a tied head is counted once. See `basis`."""

    active_parameters: int
    """Parameters that one token passes; fewer than `parameters` with routed experts."""

    linear_targets: tuple[str, ...]
    """Names of the linear modules that LoRA's `all-linear` takes; without `lm_head`."""

    linear_shapes: dict[str, tuple[int, int, int]]
    """Name: inputs, outputs, modules in the whole model."""

    dtype: str | None
    """`dtype` or `torch_dtype` of config.json, for example `bfloat16`."""

    layer_class: str | None
    """Class of a decoder layer, which FSDP wraps; None where the family is unknown."""

    has_chat_template: bool | None
    """Whether the tokenizer brings a chat template; None where it cannot be told."""

    has_tokenizer: bool
    """Whether tokenizer files are there; may be False only in the Hub cache."""

    has_weights: bool
    """Whether weight files are there; may be False only in the Hub cache."""

    weights_bytes: int
    """Size of the weight files in bytes."""

    config_hash: str
    """First 16 hexadecimal digits of the SHA-256 of config.json."""

    basis: str
    """Where `parameters` is from: `config.json`, `safetensors headers`, `unknown architecture`."""

    quantized: str | None
    """Quantisation of the stored weights, for example `bitsandbytes-4bit`, `gptq`; else None."""


def probe_model(path: str, revision: str | None = None) -> ModelFacts | None:
    """Facts about a local model folder, or about a Hub model in this machine's cache.

    Args:
        path: a folder, or a Hub name (`organisation/name`).
        revision: branch, tag or commit of a Hub model; its default branch where None.

    Returns:
        The facts; None for a Hub name that is not in the cache.

    Raises:
        SpecError: `model_not_found`, `model_no_config`, `model_bad_config`,
            `model_no_tokenizer`, `model_no_weights`, `model_bad_weights`.
    """
    folder = Path(path).expanduser()
    if folder.exists():
        _check_folder(folder, path)
        return _read_folder(folder, path)
    if _looks_local(path):
        raise SpecError(
            "model_not_found",
            f"the model folder {path} does not exist",
            why=f"it was looked for at {folder.absolute()}",
            fix="correct `model`, or give a Hub name like `organisation/name`",
        )
    snapshot = _find_snapshot(path, revision)
    return None if snapshot is None else _read_folder(snapshot, path)


def _looks_local(path: str) -> bool:
    """Whether a missing path was meant as a folder: a Hub name has at most one slash."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or path.endswith("/")


def _check_folder(folder: Path, path: str) -> None:
    """Refuse a local folder from which no run can start."""
    if not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        raise SpecError(
            "model_no_config",
            f"{path} has no config.json",
            why="it holds an adapter, not a model"
            if adapter
            else ("it is a file, not a folder" if folder.is_file() else ""),
            fix="give the base model's folder"
            if adapter
            else "give a folder written by `save_pretrained`, or a Hub name",
        )
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise SpecError(
            "model_no_tokenizer",
            f"{path} has no tokenizer",
            why=f"none of {', '.join(_TOKENIZER_FILES)} is there",
            fix="save the tokenizer into the folder with `tokenizer.save_pretrained`",
        )
    if not _weight_files(folder):
        raise SpecError(
            "model_no_weights",
            f"{path} has no weights",
            why=f"no file matches {' or '.join(_WEIGHT_PATTERNS)}",
            fix="download the weights into the folder, or give another one",
        )


def _hub_cache() -> Path:
    """The Hub cache's folder, by huggingface_hub's own rules (constants.py)."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(name):
            return Path(os.environ[name]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{base}/huggingface"
    return Path(home).expanduser() / "hub"


def _find_snapshot(name: str, revision: str | None) -> Path | None:
    """Folder of a Hub model's files in the cache; None where it is not cached."""
    repository = _hub_cache() / f"models--{name.replace('/', '--')}"
    commit = revision or "main"
    reference = repository / "refs" / commit
    if reference.is_file():
        commit = reference.read_text(encoding="utf-8").strip()
    snapshot = repository / "snapshots" / commit
    return snapshot if (snapshot / "config.json").is_file() else None


def _read_folder(folder: Path, path: str) -> ModelFacts:
    """Facts from a folder that has a config.json."""
    import hashlib  # noqa: PLC0415 - only a readable model pays for it

    raw = (folder / "config.json").read_bytes()
    config = _read_json(folder / "config.json", raw)
    text = config.get("text_config")
    inner = {**config, **text} if isinstance(text, dict) else config
    shape = _read_shape(inner, folder)
    weights = _weight_files(folder)
    stored = _stored_parameters(folder, weights)
    parameters, active, basis = _count(shape, stored)
    return ModelFacts(
        path=path,
        architecture=str((config.get("architectures") or [""])[0]),
        model_type=str(inner.get("model_type", "")),
        **shape.dimensions(),
        max_position_embeddings=shape.max_position_embeddings,
        tie_word_embeddings=shape.tied,
        parameters=parameters,
        active_parameters=active,
        linear_targets=tuple(shape.linear_shapes),
        linear_shapes=shape.linear_shapes,
        dtype=_dtype(config, inner),
        layer_class=shape.layer_class,
        has_chat_template=_has_chat_template(folder),
        has_tokenizer=any((folder / name).is_file() for name in _TOKENIZER_FILES),
        has_weights=bool(weights),
        weights_bytes=sum(file.stat().st_size for file in weights),
        config_hash=hashlib.sha256(raw).hexdigest()[:16],
        basis=basis,
        quantized=_quantized(config),
    )


def _read_json(file: Path, raw: bytes) -> Config:
    """The object in a JSON file, or a refusal that names the file and the line."""
    try:
        value = json.loads(raw)
    except ValueError as error:
        line = getattr(error, "lineno", None)
        raise SpecError(
            "model_bad_config",
            f"{file}{f':{line}' if line else ''} is not valid JSON",
            why=str(error),
            fix="download the file again",
        ) from None
    if not isinstance(value, dict):
        raise SpecError(
            "model_bad_config",
            f"{file} holds no JSON object",
            fix="download the file again",
        )
    return value


def _read_shape(config: Config, folder: Path) -> Shape:
    """The shape in a configuration, or a refusal that names what it lacks."""
    absent = missing_keys(config)
    if absent:
        raise SpecError(
            "model_bad_config",
            f"{folder / 'config.json'} does not say {', '.join(absent)}",
            why="these keys are needed to describe a decoder model",
            fix="give a causal language model's folder",
        )
    try:
        return read_shape(config)
    except (TypeError, ValueError, ZeroDivisionError, AttributeError) as error:
        raise SpecError(
            "model_bad_config",
            f"{folder / 'config.json'} describes no model",
            why=str(error),
            fix="download the file again",
        ) from None


def _weight_files(folder: Path) -> list[Path]:
    """Files of the model's weights: safetensors where there are any, else PyTorch's own."""
    if not folder.is_dir():
        return []
    for pattern in _WEIGHT_PATTERNS:
        found = [
            file for file in sorted(folder.glob(pattern)) if not file.name.startswith(_NOT_WEIGHTS)
        ]
        if found:
            return found
    return []


def _stored_parameters(folder: Path, weights: list[Path]) -> int | None:
    """Parameters by the headers of the weight files; None where the files are PyTorch's own."""
    _check_index(folder)
    if not weights or weights[0].suffix != ".safetensors":
        return None
    return sum(_count_header(read_safetensors_header(file)) for file in weights)


def _check_index(folder: Path) -> None:
    """Refuse a folder whose index names weight files that are not there."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file() or (folder / "model.safetensors").is_file():
        return
    names = _read_json(index, index.read_bytes()).get("weight_map")
    wanted = sorted(set(names.values())) if isinstance(names, dict) else []
    absent = [name for name in wanted if not (folder / str(name)).is_file()]
    # A snapshot in the Hub cache may hold no weights yet; the run downloads them.
    if absent and len(absent) < len(wanted):
        raise SpecError(
            "model_bad_weights",
            f"{len(absent)} of {len(wanted)} weight files are missing from {folder}",
            why=f"{index.name} names {absent[0]}",
            fix="download the model again",
        )


def _count_header(header: dict[str, Any]) -> int:
    """Elements of every tensor that a header lists."""
    total = 0
    for entry in header.values():
        elements = 1
        for size in entry["shape"]:
            elements *= size
        total += elements
    return total


def read_safetensors_header(path: str | Path) -> dict[str, Any]:
    """The header of a safetensors file: name to `dtype`, `shape` and `data_offsets`.

    `__metadata__` is left out. Only the header is read; that the file is as long as its
    header says is checked too, so that a download cut short is found before a run.

    Raises:
        SpecError: `model_bad_weights` where the file is damaged or cut short.
    """
    file = Path(path)
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(_HEADER_LENGTH_BYTES), "little")
        if not 1 < length <= min(size - _HEADER_LENGTH_BYTES, _LARGEST_HEADER_BYTES):
            raise _bad_weights(file, "its header is damaged or cut short")
        raw = stream.read(length)
    try:
        header: dict[str, Any] = json.loads(raw)
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        _count_header(header)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        raise _bad_weights(file, "its header is not readable") from None
    expected = _HEADER_LENGTH_BYTES + length + end
    if size != expected:
        raise _bad_weights(file, f"it has {size:,} bytes where its header says {expected:,}")
    return header


def _bad_weights(file: Path, why: str) -> SpecError:
    return SpecError(
        "model_bad_weights",
        f"the weight file {file} is damaged",
        why=why,
        fix="download it again",
        source="https://huggingface.co/docs/safetensors (format)",
    )


def _count(shape: Shape, stored: int | None) -> tuple[int, int, str]:
    """Parameters, parameters that one token passes, and where they are from.

    A known family's formula is preferred: stored tensors of a quantised model are packed,
    and some files hold a tied head twice.
    """
    if shape.known:
        return shape.parameters, shape.active_parameters, "config.json"
    if stored:
        return stored, stored, "safetensors headers"
    return shape.parameters, shape.active_parameters, "unknown architecture"


def _dtype(config: Config, inner: Config) -> str | None:
    """The dtype that the weights were saved in, without `torch.`."""
    for source in (config, inner):
        for key in ("dtype", "torch_dtype"):
            if isinstance(source.get(key), str):
                return str(source[key]).removeprefix("torch.")
    return None


def _has_chat_template(folder: Path) -> bool | None:
    """Whether the tokenizer brings a chat template, in any of the places it may lie."""
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    settings = folder / "tokenizer_config.json"
    if not settings.is_file():
        return None if not (folder / "tokenizer.json").is_file() else False
    return bool(_read_json(settings, settings.read_bytes()).get("chat_template"))


def _quantized(config: Config) -> str | None:
    """Method of `quantization_config`, with the bits where bitsandbytes is the method."""
    settings = config.get("quantization_config")
    if not isinstance(settings, dict):
        return None
    method = str(settings.get("quant_method") or "unknown")
    if method == "bitsandbytes":
        return f"{method}-{'4bit' if settings.get('load_in_4bit') else '8bit'}"
    return method
