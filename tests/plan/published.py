"""The published measurements as inputs of the estimate; see data/published.csv."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any, NamedTuple

from launcher.plan.memory import MemoryEstimate, MemoryInputs, context_bytes, estimate_memory

GIB = 2**30

# layers, hidden, MLP, heads, key heads, vocabulary, parameters, tied; from each config.json.
SHAPES: dict[str, tuple[int, int, int, int, int, int, int, bool]] = {
    "llama3.2-3b": (28, 3072, 8192, 24, 8, 128256, 3_212_749_824, True),
    "llama3.1-8b": (32, 4096, 14336, 32, 8, 128256, 8_030_261_248, False),
    "llama3-8b": (32, 4096, 14336, 32, 8, 128256, 8_030_261_248, False),
    "llama2-7b": (32, 4096, 11008, 32, 32, 32000, 6_738_415_616, False),
    "llama2-13b": (40, 5120, 13824, 40, 40, 32000, 13_015_864_320, False),
    "llama2-70b": (80, 8192, 28672, 64, 8, 32000, 68_976_648_192, False),
    "qwen1-7b": (32, 4096, 11008, 32, 32, 151936, 7_721_324_544, False),
    "qwen1-14b": (40, 5120, 13696, 40, 40, 152064, 14_167_290_880, False),
    "qwen2-7b": (28, 3584, 18944, 28, 4, 152064, 7_615_616_512, False),
    "qwen2.5-1.5b": (28, 1536, 8960, 12, 2, 151936, 1_543_714_304, True),
    "qwen2.5-7b": (28, 3584, 18944, 28, 4, 152064, 7_615_616_512, False),
    "smollm2-135m": (30, 576, 1536, 9, 3, 49152, 134_515_008, True),
    "smollm2-360m": (32, 960, 2560, 15, 5, 49152, 361_821_120, True),
    "smollm2-1.7b": (24, 2048, 8192, 32, 32, 49152, 1_711_376_384, True),
    "tinyllama": (22, 2048, 5632, 32, 4, 32000, 1_100_048_384, False),
    "mistral-7b-v0.3": (32, 4096, 14336, 32, 8, 32768, 7_248_023_552, False),
}


def shape_of(model: str) -> dict[str, Any]:
    """A model's row of SHAPES by the names of `MemoryInputs`."""
    layers, hidden, mlp, heads, keys, vocabulary, parameters, _ = SHAPES[model]
    return {
        "layers": layers,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "attention_heads": heads,
        "key_value_heads": keys,
        "head_dim": hidden // heads,
        "vocab_size": vocabulary,
        "parameters": parameters,
    }


LLAMA_8B = shape_of("llama3.1-8b")
_MLP = ("gate_proj", "up_proj", "down_proj")
TARGETS: dict[str, tuple[str, ...] | None] = {
    "all": None,
    "attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "qv": ("q_proj", "v_proj"),
    "tune": ("q_proj", "v_proj", "o_proj", *_MLP),
    "answer": ("q_proj", "k_proj", "v_proj", *_MLP),
    "qwen1": None,  # c_attn (q, k, v), c_proj, w1, w2: every linear module
}

# What the sources' own scripts set and the table leaves out.
# prefix of the row's id: lora_dropout, autocast (a trainer's `bf16: true`), whether the
# model casts its logits to float32 (transformers before 4.45)
SCRIPTS: tuple[tuple[str, float, bool, bool], ...] = (
    ("tt", 0.0, False, False),
    ("peft", 0.1, True, True),
    ("aa", 0.1, False, True),
    ("lit", 0.05, False, False),
    ("qwen1", 0.05, True, True),
    ("liger", 0.0, True, True),
    ("titan", 0.0, False, False),
    ("longlora", 0.0, True, True),
    ("lf", 0.0, True, True),
    ("fc", 0.0, False, False),
)

_LOSS = {"naive": "full_logits", "chunk8": "chunked", "chunk": "fused"}
_DTYPE = {"bf16pure": "bfloat16", "fp32shard": "float32", "fp16": "float16"}


class Row(NamedTuple):
    """One measurement beside its estimate."""

    id: str
    metric: str
    missing: str
    measured: float
    measured_reserved: float | None
    estimate: MemoryEstimate
    context: int

    @property
    def predicted(self) -> float:
        """The estimate of what the source measured."""
        dashboard = any(word in self.metric for word in ("nvidia-smi", "VRAM"))
        if dashboard:
            return (self.estimate.peak_reserved_bytes + self.context) / GIB
        if "reserved" in self.metric:
            return self.estimate.peak_reserved_bytes / GIB
        return self.estimate.peak_allocated_bytes / GIB

    @property
    def error(self) -> float:
        """Relative error, positive where the estimate is too high."""
        return self.predicted / self.measured - 1


def inputs_of(row: dict[str, str]) -> MemoryInputs:
    dropout, autocast, upcast = next(s[1:] for s in SCRIPTS if row["id"].startswith(s[0]))
    quantized = row["method"] == "qlora"
    half_precision = row["scheme"] == "fp16"
    values: dict[str, Any] = {
        "method": row["method"],
        "strategy": row["strategy"],
        "gpus": int(row["N"]),
        "micro_batch_size": int(row["mbs"]),
        "sequence_length": int(row["seq"]),
        "gradient_checkpointing": row["gc"] != "0",
        "selective_checkpointing": row["gc"] == "sac-op",
        "logits_dtype": "float32" if upcast else None,
        "activation_offload": "offload ON" in row["missing"],
        "loss_path": _LOSS[row["loss"]],
        "parameter_dtype": _DTYPE[row["scheme"]],
        "embedding_dtype": "float32" if quantized and half_precision else None,
        "compute_dtype": "float16" if half_precision else "bfloat16",
        "autocast": autocast,
        "adapter_dtype": "float32" if half_precision or autocast else "bfloat16",
        "optimizer": "adamw_torch_fused",
        "lora_rank": int(row["r"]),
        "lora_targets": TARGETS[row["targets"]],
        "lora_dropout": dropout,
        "quantization": "nf4" if quantized else None,
        "double_quantization": row["dq"] == "1",
        "compile": row["compile"] == "1",
    }
    tied = SHAPES[row["model"]][-1]
    return MemoryInputs(**shape_of(row["model"]), tie_word_embeddings=tied, **values)


def read_rows() -> list[Row]:
    file = Path(__file__).parent / "data" / "published.csv"
    with file.open(encoding="utf-8") as stream:
        return [
            Row(
                id=row["id"],
                metric=row["metric"],
                missing=row["missing"],
                measured=float(row["measured_GiB"]),
                measured_reserved=float(row["reserved_GiB"]) if row["reserved_GiB"] else None,
                estimate=estimate_memory(inputs_of(row)),
                context=context_bytes(inputs_of(row)),
            )
            for row in csv.DictReader(stream)
        ]


def mean_error(rows: list[Row]) -> float:
    """Mean absolute relative error."""
    return sum(abs(row.error) for row in rows) / len(rows)


def main() -> None:
    """Print every row with its estimate: `python -m tests.plan.published`."""
    rows = read_rows()
    lines = []
    for row in rows:
        parts = {name: round(value / GIB, 2) for name, value in row.estimate.parts.items()}
        lines.append(
            f"{row.id:30s} {row.measured:6.2f} {row.predicted:6.2f} {row.error:+6.1%} {parts}"
        )
    complete = [row for row in rows if not row.missing]
    lines.append(f"{len(rows)} rows: {mean_error(rows):.2%}")
    lines.append(f"{len(complete)} complete rows: {mean_error(complete):.2%}")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
