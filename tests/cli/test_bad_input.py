"""A user's mistakes: each gets one line with its place and its fix, and leaves nothing behind."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from launcher.spec.arguments import OLDER, OWNED
from tests.support import HOSTILE_NAMES, Outcome, make_model, sftlaunch, tree, write_rows

pytestmark = pytest.mark.usefixtures("bare_machine")
GOOD = "model: model\ndataset: data.jsonl\n"


@dataclass(frozen=True)
class Mistake:
    """A mistake, the exit code it must have, and what the message must hold."""

    name: str
    code: int
    says: tuple[str, ...]
    spec: str | bytes | None = GOOD
    flags: tuple[str, ...] = ()
    prepare: Callable[[], object] | None = None
    run: bool = False
    """Through `run`, not `plan`."""


def _prepare() -> None:
    make_model(Path("model"))
    write_rows(Path("data.jsonl"))


def _check(mistake: Mistake) -> Outcome:
    _prepare()
    if mistake.spec is not None:
        text = mistake.spec if isinstance(mistake.spec, bytes) else mistake.spec.encode()
        Path("sft.yaml").write_bytes(text)
    if mistake.prepare:
        mistake.prepare()
    command = "run" if mistake.run else "plan"
    before = tree(Path())
    started = time.process_time()  # of this process: the machine may be busy with others
    done = sftlaunch(command, *mistake.flags)
    assert time.process_time() - started < 1.0
    assert tree(Path()) == before, "something was left behind"
    assert_refused(done, mistake.code, mistake.says)
    as_json = sftlaunch(command, *mistake.flags, "--json")
    error = as_json.json["error"]
    assert as_json.code == mistake.code
    assert error["message"]
    assert error["fix"]
    assert error["code"] not in ("defect", ""), error
    assert tree(Path()) == before, "something was left behind"
    return done


def assert_refused(done: Outcome, code: int, says: tuple[str, ...]) -> None:
    """One line on standard error, nothing on standard output."""
    assert done.code == code, done.err
    assert done.out == ""
    assert done.err.startswith("error: ")
    assert done.err.endswith("\n")
    assert done.err.count("\n") == 1, done.err
    assert "Traceback" not in done.err
    assert "defect" not in done.err, done.err
    assert "pydantic" not in done.err.lower(), done.err
    for part in says:
        assert part in done.err, done.err


def _edit_config(**changes: object) -> Callable[[], object]:
    def edit() -> object:
        file = Path("model/config.json")
        values = {**json.loads(file.read_text(encoding="utf-8")), **changes}
        return file.write_text(json.dumps(values), encoding="utf-8")

    return edit


def _write(file: str, content: str | bytes) -> Callable[[], object]:
    data = content.encode() if isinstance(content, str) else content
    return lambda: Path(file).write_bytes(data)


def _remove(*files: str) -> Callable[[], object]:
    return lambda: [Path(file).unlink() for file in files]


def _line(line: str, *says: str, name: str | None = None, code: int = 2) -> Mistake:
    """A mistake on line 3 of the spec."""
    return Mistake(name or line[:50], code, ("sft.yaml:3: ", *says), GOOD + line + "\n")


MESSAGES = (
    '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
)
BAD_YAML_TEXT = "sft.yaml"

SYNTAX = [
    Mistake("empty spec", 2, ("sft.yaml", "model", "--model"), ""),
    Mistake("comments only", 2, ("sft.yaml", "model"), "# nothing\n"),
    Mistake("a list", 2, ("sft.yaml", "list", "not a mapping"), "- model\n- data\n"),
    Mistake("a word", 2, ("sft.yaml", "not a mapping"), "llama\n"),
    Mistake("a number", 2, ("sft.yaml", "not a mapping"), "3\n"),
    Mistake(
        "duplicate key", 2, ("sft.yaml:3: model is already set on line 1",), GOOD + "model: b\n"
    ),
    Mistake(
        "duplicate inner key",
        2,
        ("sft.yaml:3: seed is already set on line 3",),
        GOOD + "training: {seed: 1, seed: 2}\n",
    ),
    Mistake("tab", 2, ("sft.yaml:4: ", "tab", "spaces"), GOOD + "training:\n\tseed: 1\n"),
    Mistake("open bracket", 2, ("sft.yaml:", "correct the YAML"), GOOD + "lora: {rank: 1\n"),
    Mistake("bad indentation", 2, ("sft.yaml:",), GOOD + "training:\n  seed: 1\n lora: {}\n"),
    Mistake(
        "invalid UTF-8",
        2,
        ("sft.yaml: not UTF-8 at byte", "save it as UTF-8"),
        b"model: \xff\xfe\n",
    ),
    Mistake("binary junk", 2, ("sft.yaml",), bytes(range(256)) * 4),
    Mistake("null bytes", 2, ("sft.yaml",), b"model: a\x00b\n"),
    Mistake("a zip", 2, ("sft.yaml",), b"PK\x03\x04\x14\x00\x00\x00\x08\x00"),
    Mistake("UTF-16", 2, ("sft.yaml",), GOOD.encode("utf-16")),
    Mistake("two documents", 2, ("sft.yaml",), GOOD + "---\nmodel: b\n"),
    Mistake("alias to itself", 2, ("sft.yaml",), GOOD + "training: &a\n  seed: *a\n"),
    Mistake("unknown alias", 2, ("sft.yaml:3",), GOOD + "method: *nothing\n"),
    Mistake(
        "python object", 2, ("sft.yaml",), GOOD + "method: !!python/object/apply:os.system [ls]\n"
    ),
    Mistake("unknown tag", 2, ("sft.yaml",), GOOD + "method: !mine lora\n"),
    Mistake("a mapping as key", 2, ("sft.yaml:3: a key must be a word",), GOOD + "{a: b}: c\n"),
    Mistake("deep nesting", 2, ("sft.yaml",), "model: " + "[" * 900 + "]" * 900 + "\n"),
    Mistake("impossible date", 2, ("sft.yaml",), GOOD + "method: 2020-13-45\n"),
    Mistake("impossible binary", 2, ("sft.yaml",), GOOD + "method: !!binary '***'\n"),
    Mistake("bad merge", 2, ("sft.yaml",), GOOD + "training:\n  <<: 3\n"),
    Mistake(
        "not there", 2, ("no spec file nowhere.yaml", "sftlaunch init"), flags=("nowhere.yaml",)
    ),
    Mistake("a folder", 2, ("model is a folder", "model/sft.yaml"), flags=("model",)),
    Mistake("newline in its name", 2, ("no spec file",), flags=("a\nb.yaml",)),
    Mistake("null in its name", 2, ("spec",), flags=("a\x00b.yaml",)),
    Mistake("a very long name", 2, ("name",), flags=("x" * 5000 + ".yaml",)),
    Mistake("below a file", 2, ("data.jsonl/sft.yaml",), flags=("data.jsonl/sft.yaml",)),
    Mistake("a misspelt command", 2, ("plam",), flags=("plam",)),
]

KEYS = [
    _line("strateg: ddp", "unknown key strateg", "did you mean strategy?"),
    _line(
        "training: {learning_rte: 1}",
        "unknown key training.learning_rte",
        "training.learning_rate?",
    ),
    _line(
        "training: {gradient_checkpointin: true}", "did you mean training.gradient_checkpointing?"
    ),
    _line("lora: {rnk: 8}", "unknown key lora.rnk", "did you mean lora.rank?"),
    _line("hardware: {gpu_count: 8}", "unknown key hardware.gpu_count", "hardware.gpu"),
    _line(
        "batch: {zzz: 8}",
        "unknown key batch.zzz",
        "valid here: global_batch_size, micro_batch_size",
    ),
    _line("zzz: 8", "unknown key zzz", "valid here: "),
    _line("learning_rate: 1.0e-4", "outside its section", "training.learning_rate"),
    _line("neftune_noise_alpha: 5", "training.neftune_noise_alpha"),
    _line("per_device_train_batch_size: 5", "batch.micro_batch_size"),
    _line("slurm: {container: {image: x}}", "slurm.container.runtime"),
    _line("true: 3", "unknown key", name="boolean key"),
    _line("1: 3", "unknown key 1", name="numeric key"),
    _line("model.path: x", "unknown key model.path", name="dotted key in a file"),
]

TYPES = [
    _line("lora: {rank: eight}", "lora.rank is 'eight' (text)", "integer", "correct lora.rank"),
    _line("lora: {rank: 8.5}", "lora.rank", "integer"),
    _line('lora: {rank: "8"}', "lora.rank is '8' (text)"),
    _line("lora: {rank: true}", "lora.rank"),
    _line("lora: {rank: 0}", "lora.rank", "greater than or equal to 1"),
    _line("lora: {rank: -8}", "lora.rank", "greater than or equal to 1"),
    _line("lora: {dropout: 1.5}", "lora.dropout", "less than 1"),
    _line("lora: [rank, 8]", "lora is"),
    _line("lora:", "lora has no value", "give lora a value or remove it"),
    _line("method:", "method has no value"),
    _line("method: lorra", "'lorra'", "did you mean lora?"),
    _line("method: 3", "method is 3 (integer)"),
    _line("strategy: fdsp", "did you mean fsdp?"),
    _line("strategy: horovod", "choose one of auto, single, ddp"),
    _line("quantization: fp8", "choose one of none, nf4, 8bit"),
    _line("offload: disk", "choose one of none, optimizer, all"),
    _line("batch: {micro_batch_size: 0}", "batch.micro_batch_size"),
    _line("batch: {micro_batch_size: -1}", "batch.micro_batch_size"),
    _line("batch: {micro_batch_size: most}", "batch.micro_batch_size", "auto"),
    _line("batch: {global_batch_size: 0}", "batch.global_batch_size"),
    _line("hardware: {gpus: 0}", "hardware.gpus"),
    _line("hardware: {gpus: all}", "hardware.gpus is 'all'"),
    _line("training: {learning_rate: 0}", "training.learning_rate", "greater than 0"),
    _line("training: {learning_rate: -1.0e-4}", "training.learning_rate"),
    _line("training: {learning_rate: .nan}", "training.learning_rate"),
    _line("training: {learning_rate: .inf}", "training.learning_rate"),
    _line("training: {learning_rate: 1e400}", "training.learning_rate"),
    _line("training: {weight_decay: .inf}", "training.weight_decay"),
    _line("training: {weight_decay: -0.1}", "training.weight_decay"),
    _line("training: {num_train_epochs: 0}", "training.num_train_epochs"),
    _line("training: {num_train_epochs: .nan}", "training.num_train_epochs"),
    _line("training: {max_steps: 0}", "training.max_steps"),
    _line("training: {max_length: -5}", "training.max_length"),
    _line("training: {seed: -1}", "training.seed"),
    _line("training: {seed: 1.5}", "training.seed"),
    _line('training: {bf16: "yes"}', "training.bf16"),
    _line("training: {packing: 1}", "training.packing"),
    _line("training: {neftune_noise_alpha: .nan}", "training.neftune_noise_alpha", "finite"),
    _line("training: {optim_target_modules: [1, .inf]}", "training.optim_target_modules"),
    _line(
        "training: {optim: adamw_torch_fuse}", "training.optim", "did you mean adamw_torch_fused?"
    ),
    _line("training: {optim: shampoo}", "training.optim", "choose one of ", "adamw_torch_fused"),
    _line("training: {lr_scheduler_type: cosin}", "did you mean cosine?"),
    _line("evaluation: {every_steps: 1e3}", "evaluation.every_steps is 1000.0 (number)"),
    _line("training: {seed: 4294967296}", "training.seed", "less than 4294967296"),
    _line(
        "slurm: {time_limit: 12}", "slurm.time_limit is 12 (integer)", 'quote it: time_limit: "12"'
    ),
    _line("training: {learning_rate: 1e-4x}", "training.learning_rate is '1e-4x' (text)"),
    _line("training: {seed: 010}", "training.seed is '010' (text)"),
    _line("lora: {target_modules: 3}", "lora.target_modules is 3", "string or a valid list"),
    _line("lora: {target_modules: [3]}", "lora.target_modules.0 is 3"),
    _line('samples: {prompts: ["\\uD800"]}', "cannot be read"),
    _line("lora: {rank: " + "9" * 5000 + "}", "cannot be read", name="5000 digits"),
    _line("training: {neftune_noise_alpha: lots}", "SFTConfig.neftune_noise_alpha takes", "float"),
    _line("checkpoints: {keep: 0}", "checkpoints.keep"),
    _line("evaluation: {every_steps: 0}", "evaluation.every_steps"),
    _line("samples: {prompts: hello}", "samples.prompts"),
    _line("samples: {prompts: [1, 2]}", "samples.prompts"),
    _line("trackers: tensorboard", "trackers"),
    _line("output: 3", "output is 3 (integer)"),
    _line("output: ''", "output is empty", "set output"),
    _line('output: "a\\nb"', "control character", "rename"),
    _line('output: "a\\0b"', "control character"),
    _line("slurm: {container: {runtime: podman, image: x}}", "slurm.container.runtime"),
    Mistake("model is a number", 2, ("sft.yaml:1: ", "model"), "model: 3\n"),
    Mistake("model is empty", 2, ("sft.yaml:1: ", "model"), "model: ''\n"),
    Mistake(
        "attention misspelt",
        2,
        ("sft.yaml:1: model.attn_implementation", "did you mean flash_attention_2?"),
        "model: {path: model, attn_implementation: flash_attention2}\n",
    ),
    Mistake("model without path", 2, ("sft.yaml:1", "model"), "model: {revision: main}\n"),
    Mistake("dataset is a list", 2, ("sft.yaml:2: ", "dataset"), "model: model\ndataset: [a, b]\n"),
    Mistake(
        "two ways to hold out",
        2,
        ("sft.yaml:2", "exclude each other"),
        "model: model\ndataset: {path: data.jsonl, eval_share: 0.1, eval_split: test}\n",
    ),
    Mistake(
        "eval_share above 1",
        2,
        ("sft.yaml:2: dataset.eval_share",),
        "model: model\ndataset: {path: data.jsonl, eval_share: 5}\n",
    ),
]

FLAGS = [
    Mistake("--set without =", 2, ("--set", "KEY=VALUE"), flags=("--set", "training.seed")),
    Mistake("--set without a key", 2, ("--set", "KEY=VALUE"), flags=("--set", "=3")),
    Mistake(
        "--set of an unknown key",
        2,
        ("--set training.sed: ", "training.seed?"),
        flags=("--set", "training.sed=3"),
    ),
    Mistake(
        "--set of a wrong type", 2, ("--set lora.rank: ", "integer"), flags=("--set", "lora.rank=x")
    ),
    Mistake("--set of broken YAML", 2, ("--set lora",), flags=("--set", "lora={rank")),
    Mistake("--set with an empty part", 2, ("--set",), flags=("--set", "training..seed=3")),
    Mistake(
        "--set below a value", 2, ("--set training.seed.x",), flags=("--set", "training.seed.x=3")
    ),
    Mistake("--set of a duplicate", 2, ("--set lora",), flags=("--set", "lora={rank: 1, rank: 2}")),
    Mistake("--set of two documents", 2, ("--set",), flags=("--set", "lora.rank=1\n---\n2")),
    Mistake("an unknown flag", 2, ("--gpsu", "--help"), flags=("--gpsu", "8")),
    Mistake("two specs", 2, ("unexpected extra argument", "--help"), flags=("sft.yaml", "b.yaml")),
    Mistake("--gpus 0", 2, ("--gpus", "x>=1"), flags=("--gpus", "0")),
    Mistake("--gpus -8", 2, ("--gpus",), flags=("--gpus", "-8")),
    Mistake("--gpus eight", 2, ("--gpus", "integer"), flags=("--gpus", "eight")),
    Mistake("--gpus without a value", 2, ("--gpus",), flags=("--gpus",)),
    Mistake(
        "--micro-batch-size 0", 2, ("--micro-batch-size", "auto"), flags=("--micro-batch-size", "0")
    ),
    Mistake("--strategy horovod", 2, ("--strategy", "zero3"), flags=("--strategy", "horovod")),
    Mistake("--strategy fdsp", 2, ("did you mean fsdp?",), flags=("--strategy", "fdsp")),
    Mistake("--method adalora", 2, ("--method", "qlora"), flags=("--method", "adalora")),
    Mistake(
        "--gpu h1000", 2, ("'h1000'", "did you mean h100-80gb", "known: "), flags=("--gpu", "h1000")
    ),
    Mistake("--gpu nonsense", 2, ("known: ", "a100-80gb"), flags=("--gpu", "$(touch pwned)")),
    Mistake("--gpu empty", 2, ("--gpu", "empty"), flags=("--gpu", "")),
    Mistake("--device tpu", 2, ("--device", "cuda"), flags=("--device", "tpu")),
    Mistake("--on cloud", 2, ("--on", "slurm"), flags=("--on", "cloud")),
    Mistake("--output empty", 2, ("--output", "empty"), flags=("--output", "")),
    Mistake(
        "--output with a newline", 2, ("--output", "control character"), flags=("--output", "a\nb")
    ),
    Mistake("--model empty", 2, ("model",), flags=("--model", "")),
    Mistake("--model with a null byte", 2, ("control character",), flags=("--model", "a\x00b")),
    Mistake("--output not UTF-8", 2, ("not valid UTF-8",), flags=("--output", "a\udcff")),
    Mistake("--model not UTF-8", 2, ("not valid UTF-8",), flags=("--model", "a\udcff")),
    Mistake("a spec's name not UTF-8", 2, ("no spec file",), flags=("a\udcff.yaml",)),
    Mistake(
        "FSDP offload on CPU",
        3,
        ("--offload all", "--device cpu", "--offload none"),
        flags=("--device", "cpu", "--gpus", "2", "--strategy", "fsdp", "--offload", "all"),
    ),
    Mistake("--gpus astronomical", 2, ("--gpus", "1000000000"), flags=("--gpus", str(10**30))),
    Mistake(
        "--global-batch-size astronomical",
        2,
        ("--global-batch-size",),
        flags=("--global-batch-size", str(10**30)),
    ),
    Mistake(
        "many GPUs, small batch",
        3,
        ("divide",),
        flags=("--gpus", "1000000000", "--global-batch-size", "8"),
    ),
    Mistake("--model with a long name", 2, ("--model", "too long"), flags=("--model", "x" * 300)),
    Mistake(
        "--dataset with a long name",
        2,
        ("--dataset", "too long"),
        flags=("--dataset", "a/" + "é" * 200),
    ),
]

PLANS = [
    *(
        Mistake(
            f"{name} cannot be saved",
            3,
            (name, "cannot be saved and resumed", "adamw_torch_fused"),
            flags=("--set", f"training.optim={name}"),
        )
        for name in ("schedule_free_adamw", "galore_adamw_8bit", "apollo_adamw", "lomo", "adalomo")
    ),
    Mistake(
        "batch does not divide",
        3,
        ("100", "96 or 104"),
        flags=("--gpus", "8", "--global-batch-size", "100"),
    ),
    Mistake("nodes do not divide", 3, ("--gpus 8 or 12",), flags=("--gpus", "10", "--nodes", "4")),
    Mistake("more nodes than GPUs", 3, ("--gpus 4",), flags=("--gpus", "2", "--nodes", "4")),
    Mistake(
        "quantised full",
        3,
        ("fully fine-tuned", "qlora"),
        flags=("--method", "full", "--set", "quantization=nf4"),
    ),
    Mistake(
        "fp16 with bf16",
        3,
        ("bf16", "fp16", "keep one"),
        flags=("--set", "training.fp16=true", "--set", "training.bf16=true"),
    ),
    Mistake(
        "bf16 on a T4",
        3,
        ("t4-16gb has no bf16", "fp16=true"),
        flags=("--gpu", "t4", "--set", "training.bf16=true"),
    ),
    Mistake(
        "bf16 on a V100",
        3,
        ("v100-32gb has no bf16",),
        flags=("--gpu", "v100-32gb", "--set", "training.bf16=true"),
    ),
    Mistake(
        "fp16 on CPU",
        3,
        ("fp16 needs a GPU",),
        flags=("--device", "cpu", "--set", "training.fp16=true"),
    ),
    Mistake(
        "too long",
        3,
        ("max_length 4096", "512 positions", "max_length=512"),
        flags=("--set", "training.max_length=4096"),
    ),
    Mistake(
        "length astronomical",
        2,
        ("training.max_length",),
        flags=("--set", f"training.max_length={10**30}"),
    ),
    Mistake(
        "targets match nothing",
        3,
        ("query_proj", "q_proj, k_proj"),
        flags=("--set", "lora.target_modules=[query_proj]"),
    ),
    Mistake(
        "target on the head", 3, ("lm_head",), flags=("--set", "lora.target_modules=[lm_head]")
    ),
    Mistake("no target", 3, ("target_modules",), flags=("--set", "lora.target_modules=[]")),
    Mistake(
        "8bit under fsdp",
        3,
        ("8bit", "fsdp", "qlora"),
        flags=("--gpus", "2", "--strategy", "fsdp", "--set", "quantization=8bit"),
    ),
    Mistake(
        "stored quantised full",
        3,
        ("gptq", "fully fine-tuned", "use method lora"),
        flags=("--method", "full"),
        prepare=_edit_config(quantization_config={"quant_method": "gptq", "bits": 4}),
    ),
    Mistake(
        "qlora on 8bit",
        2,
        ("qlora means nf4",),
        flags=("--method", "qlora", "--set", "quantization=8bit"),
    ),
    Mistake(
        "hsdp on 3",
        3,
        ("hsdp", "--gpus 4"),
        flags=("--gpus", "3", "--strategy", "hsdp", "--global-batch-size", "3"),
    ),
    Mistake(
        "offload with ddp",
        3,
        ("needs ZeRO or FSDP",),
        flags=("--gpus", "2", "--strategy", "ddp", "--offload", "all"),
    ),
    Mistake(
        "tracker misspelt",
        2,
        ("--set trackers", "did you mean wandb?"),
        flags=("--set", "trackers=[wanbd]"),
    ),
    Mistake(
        "patience without evaluation",
        2,
        ("early_stopping_patience", "evaluation.every_steps"),
        flags=("--set", "evaluation.early_stopping_patience=2", "--set", "dataset.eval_share=0.5"),
    ),
    Mistake(
        "split of a file",
        2,
        ("is one file and has no split test", "eval_path"),
        flags=("--set", "dataset.eval_split=test"),
    ),
    Mistake(
        "packing without isolation",
        3,
        ("packing", "flash_attention_2"),
        flags=("--set", "training.packing=true"),
    ),
    Mistake(
        "evaluation without rows",
        2,
        ("held-out rows", "eval_share"),
        flags=("--set", "evaluation.every_steps=5"),
    ),
    Mistake(
        "assistant loss without chat",
        3,
        ("loss: assistant needs conversations",),
        flags=("--set", "loss=assistant"),
    ),
    Mistake(
        "does not fit",
        3,
        ("do not fit", "24gb", "--method lora"),
        flags=("--gpus", "1", "--gpu", "l4-24gb", "--method", "full", "--model", "big"),
        prepare=lambda: make_model(Path("big"), "llama-3.1-70b"),
    ),
    Mistake(
        "messages without a chat template",
        3,
        ("chat template", "instruct"),
        prepare=lambda: [
            Path("model/tokenizer_config.json").write_text("{}"),
            Path("data.jsonl").write_text(MESSAGES),
        ],
    ),
]

FILES = [
    Mistake(
        "model without config",
        2,
        ("has no config.json", "save_pretrained"),
        prepare=_remove("model/config.json"),
    ),
    Mistake(
        "model without tokenizer",
        2,
        ("has no tokenizer",),
        prepare=_remove("model/tokenizer.json", "model/tokenizer_config.json"),
    ),
    Mistake(
        "model without weights", 2, ("has no weights",), prepare=_remove("model/model.safetensors")
    ),
    Mistake(
        "model folder missing",
        2,
        ("/nowhere does not exist", "model"),
        flags=("--model", "./nowhere"),
    ),
    Mistake("model is a file", 2, ("no config.json", "a file"), flags=("--model", "data.jsonl")),
    Mistake(
        "broken config",
        2,
        ("config.json:1", "JSON"),
        prepare=_write("model/config.json", '{"hidden_size": 64,}'),
    ),
    Mistake(
        "binary config", 2, ("config.json",), prepare=_write("model/config.json", b"\xff\xfe\x00")
    ),
    Mistake(
        "config is a list",
        2,
        ("config.json holds no JSON object",),
        prepare=_write("model/config.json", "[]"),
    ),
    Mistake("empty config", 2, ("config.json",), prepare=_write("model/config.json", "")),
    Mistake(
        "config without layers",
        2,
        ("config.json does not say",),
        prepare=_write("model/config.json", '{"model_type": "llama"}'),
    ),
    Mistake(
        "config with text for a size", 2, ("config.json",), prepare=_edit_config(hidden_size="wide")
    ),
    Mistake(
        "config with zero heads", 2, ("config.json",), prepare=_edit_config(num_attention_heads=0)
    ),
    Mistake(
        "cut weights",
        2,
        ("model.safetensors", "download"),
        prepare=_write("model/model.safetensors", b"\x10\x00\x00\x00\x00\x00\x00\x00{}"),
    ),
    Mistake(
        "broken tokenizer settings",
        2,
        ("tokenizer_config.json",),
        prepare=_write("model/tokenizer_config.json", "{"),
    ),
    Mistake(
        "dataset missing",
        2,
        ("nothing.jsonl does not exist",),
        flags=("--dataset", "nothing.jsonl"),
    ),
    Mistake("dataset empty", 2, ("data.jsonl has no rows",), prepare=_write("data.jsonl", "")),
    Mistake(
        "dataset of blank lines",
        2,
        ("data.jsonl has no rows",),
        prepare=_write("data.jsonl", "\n\n  \n"),
    ),
    Mistake(
        "broken row",
        2,
        ("data.jsonl:3: invalid JSON",),
        prepare=_write("data.jsonl", '{"text": "a"}\n{"text": "b"}\n{"text": \n'),
    ),
    Mistake(
        "row that is a list",
        2,
        ("data.jsonl:2: a row must be an object",),
        prepare=_write("data.jsonl", '{"text": "a"}\n[1]\n'),
    ),
    Mistake(
        "row with a number for text",
        2,
        ("data.jsonl:1:", "must be a string"),
        prepare=_write("data.jsonl", '{"text": 3}\n'),
    ),
    Mistake(
        "row with invalid UTF-8",
        2,
        ("data.jsonl:2:", "UTF-8"),
        prepare=_write("data.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n'),
    ),
    Mistake(
        "unknown columns",
        2,
        ("no known format", "question"),
        prepare=_write("data.jsonl", '{"question": "a", "answer": "b"}\n'),
    ),
    Mistake(
        "unknown role",
        2,
        ("data.jsonl:1:", "role"),
        prepare=_write("data.jsonl", '{"messages": [{"role": "robot", "content": "a"}]}\n'),
    ),
    Mistake(
        "held-out file missing",
        2,
        ("gone.jsonl does not exist",),
        flags=("--set", "dataset.eval_path=gone.jsonl"),
    ),
]

RUNS = [
    Mistake(
        "no GPUs",
        4,
        ("8 GPUs", "--dry-run", "--on slurm", "--device cpu"),
        flags=("--gpus", "8"),
        run=True,
    ),
    Mistake("no GPU", 4, ("--dry-run", "--device cpu"), run=True),
    Mistake(
        "two nodes", 4, ("2 nodes", "--on slurm"), flags=("--gpus", "2", "--nodes", "2"), run=True
    ),
    Mistake(
        "no dataset",
        2,
        ("dataset is not set", "--dataset"),
        spec="model: model\n",
        flags=("--device", "cpu"),
        run=True,
    ),
    Mistake(
        "output is a file",
        2,
        ("taken exists", "--output taken-2"),
        flags=("--device", "cpu", "--output", "taken"),
        prepare=_write("taken", ""),
        run=True,
    ),
    Mistake(
        "output below a file",
        2,
        ("data.jsonl/run", "--output"),
        flags=("--device", "cpu", "--output", "data.jsonl/run"),
        run=True,
    ),
    Mistake(
        "output in /proc",
        2,
        ("/proc/sftlaunch-test/run cannot be written", "--output"),
        flags=("--device", "cpu", "--output", "/proc/sftlaunch-test/run"),
        run=True,
    ),
    Mistake(
        "output name too long",
        2,
        ("--output", "too long"),
        flags=("--device", "cpu", "--output", "x" * 300),
        run=True,
    ),
    Mistake(
        "output path too long",
        2,
        ("cannot be written", "--output"),
        flags=("--device", "cpu", "--output", "x/" * 3000),
        run=True,
    ),
    Mistake(
        "output holds other files",
        2,
        ("full exists and is no empty folder",),
        flags=("--device", "cpu", "--output", "full"),
        prepare=lambda: write_rows(Path("full/notes.txt")),
        run=True,
    ),
    Mistake(
        "output holds a run",
        2,
        ("old holds another run", "--output old-2"),
        flags=("--device", "cpu", "--output", "old"),
        prepare=lambda: write_rows(Path("old/plan.json")),
        run=True,
    ),
]


def _named(mistakes: list[Mistake]) -> list[object]:
    return [pytest.param(mistake, id=mistake.name) for mistake in mistakes]


@pytest.mark.parametrize("mistake", _named(SYNTAX))
def test_syntax(mistake: Mistake) -> None:
    _check(mistake)


@pytest.mark.parametrize("mistake", _named(KEYS))
def test_keys(mistake: Mistake) -> None:
    _check(mistake)


@pytest.mark.parametrize("mistake", _named(TYPES))
def test_types_and_values(mistake: Mistake) -> None:
    _check(mistake)


@pytest.mark.parametrize("mistake", _named(FLAGS))
def test_flags(mistake: Mistake) -> None:
    _check(mistake)


@pytest.mark.parametrize("mistake", _named(PLANS))
def test_plans_that_cannot_work(mistake: Mistake) -> None:
    _check(mistake)


@pytest.mark.parametrize("mistake", _named(FILES))
def test_models_and_datasets(mistake: Mistake) -> None:
    _check(mistake)


@pytest.mark.parametrize("mistake", _named(RUNS))
def test_runs(mistake: Mistake) -> None:
    _check(mistake)


def test_names_are_unique() -> None:
    names = [m.name for m in (*SYNTAX, *KEYS, *TYPES, *FLAGS, *PLANS, *FILES, *RUNS)]
    assert len(names) == len(set(names)) > 100


@pytest.mark.parametrize("older", sorted(OLDER))
@pytest.mark.parametrize("section", ["training", None])
def test_older_names_are_answered_with_the_new_one(older: str, section: str | None) -> None:
    text = f"training: {{{older}: 1}}" if section else f"{older}: 1"
    _check(
        _line(
            text, f"unknown key {'training.' if section else ''}{older}", f"use {OLDER[older][0]}"
        )
    )


@pytest.mark.parametrize("owned", sorted(OWNED))
def test_fields_that_the_plan_owns_are_answered_with_the_spec_s_key(owned: str) -> None:
    _check(_line(f"training: {{{owned}: true}}", f"training.{owned}", f"use {OWNED[owned]}"))


NUMBERS = (
    "lora.rank",
    "lora.alpha",
    "hardware.gpus",
    "hardware.nodes",
    "hardware.gpus_per_node",
    "batch.global_batch_size",
    "batch.micro_batch_size",
    "training.learning_rate",
    "training.num_train_epochs",
    "training.max_steps",
    "training.max_length",
    "training.warmup_steps",
    "training.weight_decay",
    "training.max_grad_norm",
    "training.seed",
    "checkpoints.every_steps",
    "samples.max_new_tokens",
)


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize("value", ["1", "1000000000", "1e308", "5e-324", "-0.0", "1e-400"])
@pytest.mark.parametrize("gpu", ["h100-80gb", None])
def test_extreme_numbers_plan_or_are_refused(key: str, value: str, gpu: str | None) -> None:
    _prepare()
    Path("sft.yaml").write_text(GOOD, encoding="utf-8")
    flags = ("--gpu", gpu) if gpu else ()
    for form in ((), ("--json",)):
        done = sftlaunch("plan", *flags, *form, "--set", f"{key}={value}")
        assert done.code in (0, 2, 3), done.err
        if form:
            json.loads(done.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


# --- hostile names ------------------------------------------------------------------------

# Key of the spec -> where a string may stand that reaches a file or a command.
STRINGS = (
    "model.path",
    "model.revision",
    "model.attn_implementation",
    "dataset.path",
    "dataset.name",
    "dataset.split",
    "dataset.eval_split",
    "training.optim",
    "training.lr_scheduler_type",
    "slurm.partition",
    "slurm.account",
    "docker.image",
    "hardware.gpu",
    "output",
)


@pytest.mark.parametrize("name", [*HOSTILE_NAMES, "new\nline", "tab\there", "nul\x00"])
@pytest.mark.parametrize("key", STRINGS)
def test_hostile_names_work_or_are_refused(key: str, name: str, bare_machine: Path) -> None:
    _prepare()
    values: dict[str, object] = {"model": {"path": "model"}, "dataset": {"path": "data.jsonl"}}
    *parents, last = key.split(".")
    here = values
    for parent in parents:
        here = here.setdefault(parent, {})  # type: ignore[assignment]
    here[last] = name
    Path("sft.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    before = tree(bare_machine)
    done = sftlaunch("run", "--dry-run", "--json")
    assert tree(bare_machine) == before
    if done.code:
        assert done.code in (2, 3, 4)
        assert done.json["error"]["code"] != "defect", done.err
        assert "Traceback" not in done.err
        assert done.err.count("\n") == 1
        return
    plan = done.json
    assert yaml.safe_load(plan["files"]["spec.yaml"])
    if key == "output":
        assert Path(plan["command"][-1]).name == Path(name).name
    if key == "model.path":
        assert plan["worker"]["model"]["path"].endswith(name.removeprefix("~"))


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_hostile_names_as_flags(name: str, bare_machine: Path) -> None:
    _prepare()
    Path("sft.yaml").write_text(GOOD, encoding="utf-8")
    before = tree(bare_machine)
    for flag in ("--model", "--dataset", "--output", "--gpu", "--set"):
        done = sftlaunch("plan", f"{flag}={name}")
        assert done.code in (0, 2, 3), done.err
        assert "defect" not in done.err, done.err
    assert tree(bare_machine) == before


# --- secrets ------------------------------------------------------------------------------


def test_no_secret_reaches_a_file_an_argv_or_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    _prepare()
    Path("sft.yaml").write_text(GOOD + "trackers: [wandb]\n", encoding="utf-8")
    secrets = {
        "HF_TOKEN": "hf_SECRETvalue1",
        "HUGGING_FACE_HUB_TOKEN": "hf_SECRETvalue2",
        "WANDB_API_KEY": "wandbSECRETvalue3",
        "AWS_SECRET_ACCESS_KEY": "awsSECRETvalue4",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    for flags in (("--json",), (), ("--json", "--gpus", "8", "--strategy", "zero3")):
        done = sftlaunch("--dry-run", *flags)
        assert done.code == 0
        assert "SECRETvalue" not in done.out + done.err


@pytest.mark.parametrize("key", ["hub_token", "push_to_hub_token"])
def test_a_secret_in_the_spec_is_refused_and_not_repeated(key: str) -> None:
    done = _check(_line(f"training: {{{key}: hf_SECRETvalue}}", "HF_TOKEN"))
    assert "SECRETvalue" not in done.err
