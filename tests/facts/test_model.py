"""The model's shape: every family against transformers' own, and the refusals."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING

import pytest

from launcher.errors import SpecError
from launcher.facts.families import known_families, missing_keys, read_shape
from launcher.facts.model import ModelFacts, probe_model, read_safetensors_header

if TYPE_CHECKING:
    from pathlib import Path

_SMALL = {
    "vocab_size": 640,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
# Family: configurations beside the default and the small one, each a change that moves the count.
_VARIANTS: dict[str, list[dict[str, object]]] = {
    "llama": [{"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}],
    "mistral": [{"head_dim": 24}],
    "qwen2": [{"tie_word_embeddings": True}],
    "qwen3": [{"head_dim": 32}, {"attention_bias": True}],
    "mixtral": [{"num_local_experts": 4, "num_experts_per_tok": 1}],
    "qwen2_moe": [{"num_experts": 6, "mlp_only_layers": [1], "qkv_bias": False}],
    "qwen3_moe": [{"num_experts": 6, "decoder_sparse_step": 2}],
    "gemma": [{"head_dim": 16}],
    "gemma2": [{"head_dim": 16}],
    "gemma3_text": [{"head_dim": 16}],
    "phi": [{"qk_layernorm": True}],
    "falcon": [
        {"new_decoder_architecture": True, "num_kv_heads": 2},
        {"multi_query": False, "bias": True},
        {"parallel_attn": False},
    ],
    "starcoder2": [{"use_bias": False}],
    "gpt_neox": [{"attention_bias": False}],
}


# Families whose small configuration needs other keys.
_SMALL_EXTRA: dict[str, dict[str, object]] = {
    "falcon": {"ffn_hidden_size": 176},
    "gpt2": {"n_inner": 176},
    "ministral": {"head_dim": 16},
    "qwen2_moe": {"moe_intermediate_size": 40, "shared_expert_intermediate_size": 56},
    "qwen3_moe": {"moe_intermediate_size": 40},
}


def _small(family: str) -> dict[str, object]:
    values = {**_SMALL, "pad_token_id": 0, **_SMALL_EXTRA.get(family, {})}
    if family in {"falcon", "gpt2"}:
        del values["intermediate_size"]
    return values


def _cases() -> list[tuple[str, dict[str, object]]]:
    cases: list[tuple[str, dict[str, object]]] = []
    for family in known_families():
        default = {"head_dim": 128} if family == "ministral" else {}  # its default cannot be built
        cases += [(family, default), (family, _small(family))]
        cases += [(family, {**_small(family), **extra}) for extra in _VARIANTS.get(family, [])]
    return cases


@pytest.mark.engine
@pytest.mark.parametrize(("family", "values"), _cases())
def test_counts_equal_those_of_transformers(family: str, values: dict[str, object]) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(family, **values)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    shape = read_shape(json.loads(json.dumps(config.to_dict(), default=str)))
    assert shape.known
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.layer_class in {type(module).__name__ for module in model.modules()}
    conv = transformers.pytorch_utils.Conv1D
    found: dict[str, list[int]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, (torch.nn.Linear, conv)) or name.endswith("lm_head"):
            continue
        key = next(k for k in sorted(shape.linear_shapes, key=len)[::-1] if name.endswith("." + k))
        found.setdefault(key, []).append(sum(p.numel() for p in module.parameters() if p.dim() > 1))
    assert {k: sum(v) for k, v in found.items()} == {
        k: i * o * n for k, (i, o, n) in shape.linear_shapes.items()
    }


@pytest.mark.engine
def test_a_saved_config_without_its_defaults_reads_the_same(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    for family in known_families():
        config = transformers.AutoConfig.for_model(family, **_small(family))
        config.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text())
        full = json.loads(json.dumps(config.to_dict(), default=str))
        assert read_shape(saved) == read_shape(full), family


# Counts that the makers publish for their models, from the values of their config.json.
@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (
            {
                "model_type": "llama",
                "vocab_size": 128256,
                "hidden_size": 4096,
                "intermediate_size": 14336,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
            },
            8_030_261_248,
        ),
        (
            {
                "model_type": "qwen2",
                "vocab_size": 152064,
                "hidden_size": 3584,
                "intermediate_size": 18944,
                "num_hidden_layers": 28,
                "num_attention_heads": 28,
                "num_key_value_heads": 4,
            },
            7_615_616_512,
        ),
        (
            {
                "model_type": "mixtral",
                "vocab_size": 32000,
                "hidden_size": 4096,
                "intermediate_size": 14336,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "num_local_experts": 8,
                "num_experts_per_tok": 2,
            },
            46_702_792_704,
        ),
    ],
)
def test_published_counts(config: dict[str, object], parameters: int) -> None:
    assert read_shape(config).parameters == parameters


def test_experts_that_a_token_does_not_pass_are_not_active() -> None:
    config = {**_SMALL, "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
    shape = read_shape(config)
    assert shape.parameters - shape.active_parameters == 3 * 6 * 3 * 64 * 176


def test_missing_keys_are_named() -> None:
    assert missing_keys({"hidden_size": 8}) == (
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
    )


def _write_safetensors(path: Path, shapes: dict[str, list[int]]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        size = 2
        for dimension in shape:
            size *= dimension
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + b"\0" * offset)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A complete model folder."""
    config = {**_SMALL, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    config["torch_dtype"] = "bfloat16"
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ x }}"}))
    _write_safetensors(tmp_path / "model.safetensors", {"a": [3, 5], "b": [7]})
    return tmp_path


def _probe(path: Path) -> ModelFacts:
    facts = probe_model(str(path))
    assert facts is not None
    return facts


def test_facts_of_a_complete_folder(folder: Path) -> None:
    facts = _probe(folder)
    assert (facts.architecture, facts.model_type, facts.layers) == ("LlamaForCausalLM", "llama", 3)
    assert facts.dtype == "bfloat16"
    assert facts.has_chat_template is True
    assert facts.basis == "config.json"
    assert facts.layer_class == "LlamaDecoderLayer"
    assert facts.linear_shapes["down_proj"] == (176, 64, 3)
    assert facts.quantized is None


def test_an_unknown_family_is_counted_from_its_weights(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({**_SMALL, "model_type": "new"}))
    assert (_probe(folder).parameters, _probe(folder).basis) == (22, "safetensors headers")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")
    assert _probe(folder).basis == "unknown architecture"


def test_text_part_and_quantisation(folder: Path) -> None:
    config = {
        "model_type": "gemma3",
        "text_config": {**_SMALL, "model_type": "gemma3_text"},
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    }
    (folder / "config.json").write_text(json.dumps(config))
    facts = _probe(folder)
    assert (facts.model_type, facts.quantized) == ("gemma3_text", "bitsandbytes-4bit")


@pytest.mark.parametrize(
    ("remove", "code"),
    [
        (["config.json"], "model_no_config"),
        (["tokenizer.json", "tokenizer_config.json"], "model_no_tokenizer"),
        (["model.safetensors"], "model_no_weights"),
    ],
)
def test_an_incomplete_folder_is_refused(folder: Path, remove: list[str], code: str) -> None:
    for name in remove:
        (folder / name).unlink()
    with pytest.raises(SpecError) as caught:
        probe_model(str(folder))
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("{\n oops}", "config.json:2"),
        ("[]", "no JSON object"),
        ("{}", "hidden_size"),
        ('{"hidden_size": "x", "vocab_size": 3}', "hidden_size"),
    ],
)
def test_a_broken_config_is_refused(folder: Path, text: str, part: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(SpecError, match=part) as caught:
        probe_model(str(folder))
    assert caught.value.code == "model_bad_config"


@pytest.mark.parametrize("damage", ["cut", "short", "length", "text", "empty"])
def test_damaged_weights_are_named(folder: Path, damage: str) -> None:
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    broken = {
        "cut": raw[:-3],
        "short": raw[:20],
        "length": struct.pack("<Q", 2**60) + raw[8:],
        "text": raw[:8] + b"x" * (len(raw) - 8),
        "empty": b"",
    }
    file.write_bytes(broken[damage])
    with pytest.raises(SpecError, match=r"model\.safetensors") as caught:
        probe_model(str(folder))
    assert caught.value.code == "model_bad_weights"


def test_missing_shards_are_named(folder: Path) -> None:
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    (folder / "model.safetensors").rename(folder / names[0])
    index = {"weight_map": {"a": names[0], "b": names[1]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SpecError, match="1 of 2 weight files") as caught:
        probe_model(str(folder))
    assert names[1] in caught.value.why


def test_header_leaves_metadata_out(folder: Path) -> None:
    assert set(read_safetensors_header(folder / "model.safetensors")) == {"a", "b"}


@pytest.mark.parametrize("path", ["./none", "/none/here", "a/b/c", "~/none-such"])
def test_a_missing_folder_is_refused(path: str) -> None:
    with pytest.raises(SpecError) as caught:
        probe_model(path)
    assert caught.value.code == "model_not_found"


def test_hub_names(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    assert probe_model("org/name") is None
    repository = cache / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "snapshots" / "abc").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots" / "abc" / "config.json").write_text(
        (folder / "config.json").read_text()
    )
    facts = probe_model("org/name")
    assert facts is not None
    assert (facts.path, facts.has_weights, facts.has_tokenizer) == ("org/name", False, False)
    assert probe_model("org/name", "abc") == facts
    assert probe_model("org/name", "other") is None
