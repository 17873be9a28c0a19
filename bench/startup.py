"""How long the command line takes to answer, cold, against `accelerate launch --help`.

Bars: `plan` on a 70B spec and `--help`, median of 15, at most 0.25 s and at most one tenth.
`python -m bench.startup`
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from bench.pairs import measure, whole

RUNS = 15
LIMIT_SECONDS = 0.25
LIMIT_RATIO = 0.1
# meta-llama/Llama-3.1-70B's config.json, the fields that the plan reads.
LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def make_spec(folder: Path) -> Path:
    """A spec for 64 GPUs on a 70B model folder without real weights."""
    model = folder / "llama-70b"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(LLAMA_70B))
    (model / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    header = b"{}"
    (model / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    spec = folder / "sft.yaml"
    spec.write_text(
        f"model: {model}\nmethod: lora\nhardware: {{gpus: 64, gpus_per_node: 8, gpu: h100-80gb}}\n"
    )
    return spec


def main() -> int:
    """Measure and print."""
    tools = Path(sys.executable).parent
    accelerate = [str(tools / "accelerate"), "launch", "--help"]
    failed = False
    with tempfile.TemporaryDirectory() as name:
        spec = make_spec(Path(name))
        for title, argv in (
            ("sftlaunch plan (70B)", [str(tools / "sftlaunch"), "plan", str(spec)]),
            ("sftlaunch --help", [str(tools / "sftlaunch"), "--help"]),
        ):
            pair = measure(lambda argv=argv: whole(argv), lambda: whole(accelerate), RUNS)
            sys.stdout.write(pair.line(title, "accelerate launch --help") + "\n")
            median = sorted(pair.first)[len(pair.first) // 2]
            failed |= median > LIMIT_SECONDS or pair.ratio > LIMIT_RATIO
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
