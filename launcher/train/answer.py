"""Load a run's final model and answer one prompt: `python -m launcher.train.answer`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from launcher.runs.directory import RunDirectory
from launcher.train.generate import render_prompt


def load_final(run: RunDirectory) -> tuple[Any, Any]:
    """The final model in eval mode (an adapter on its base) and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plan = json.loads(run.plan.read_text(encoding="utf-8"))
    settings = plan["worker"]["model"]
    loading = {
        "dtype": settings["dtype"],
        "trust_remote_code": settings["trust_remote_code"],
        "device_map": "auto" if plan["topology"]["device"] == "cuda" else None,
    }
    tokenizer = AutoTokenizer.from_pretrained(run.final)
    if plan["worker"]["peft"] is None:
        model = AutoModelForCausalLM.from_pretrained(run.final, **loading)
    else:
        from peft import PeftModel

        base = AutoModelForCausalLM.from_pretrained(
            settings["path"], revision=settings["revision"], **loading
        )
        model = PeftModel.from_pretrained(base, run.final)
    return model.eval(), tokenizer


def answer(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int) -> str:
    """The greedy answer to a prompt, rendered as in training."""
    import torch

    inputs = tokenizer(
        render_prompt(tokenizer, prompt),
        return_tensors="pt",
        add_special_tokens=tokenizer.chat_template is None,
        return_token_type_ids=False,
    ).to(model.device)
    with torch.no_grad():
        tokens = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
    new = tokens[0, inputs["input_ids"].shape[1] :]
    text: str = tokenizer.decode(new, skip_special_tokens=True)
    return text.strip()


def main(folder: str, prompt: str, max_new_tokens: str) -> None:
    """Print the answer to standard output."""
    model, tokenizer = load_final(RunDirectory(Path(folder)))
    sys.stdout.write(answer(model, tokenizer, prompt, int(max_new_tokens)) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
