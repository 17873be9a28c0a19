"""Pretrain the base model on the plain pages and write it into `model/`.

Decides the architecture and the pretraining recipe. Needs `make_tokenizer.py` to have run. One CPU
thread: a sum over threads depends on how many there are, and the figures should not.

Run: `python recipes/tiny/pretrain.py` (about a quarter of an hour on one core).
"""

from __future__ import annotations

import argparse
import math
import time
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from corpus import make_pages
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerBase

MODEL_DIR = Path(__file__).parent / "model"
SEED = 3
STEPS = 2_000
WARMUP_STEPS = 100
SEQUENCES_PER_STEP = 16
SEQUENCE_LENGTH = 128
PEAK_LEARNING_RATE = 3e-3
FINAL_LEARNING_RATE_SHARE = 0.03
PAGES_PER_READ = 1_000


def make_model(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """Build the untrained model: 1.9M parameters, under 8 MB in float32."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    return LlamaForCausalLM(config)


def make_blocks(tokenizer: PreTrainedTokenizerBase) -> Iterator[torch.Tensor]:
    """Yield blocks [SEQUENCES_PER_STEP, SEQUENCE_LENGTH] of tokens, pages end to end."""
    size = SEQUENCES_PER_STEP * SEQUENCE_LENGTH
    pages = make_pages(SEED)
    tokens: list[int] = []
    while True:
        batch = tokenizer(list(islice(pages, PAGES_PER_READ)), add_special_tokens=False)
        tokens += chain.from_iterable(batch["input_ids"])
        while len(tokens) >= size:
            yield torch.tensor(tokens[:size]).view(SEQUENCES_PER_STEP, SEQUENCE_LENGTH)
            tokens = tokens[size:]


def learning_rate_at(step: int, steps: int) -> float:
    """Linear warm-up, then cosine down to a small share of the peak."""
    if step < WARMUP_STEPS:
        return PEAK_LEARNING_RATE * (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return PEAK_LEARNING_RATE * (
        FINAL_LEARNING_RATE_SHARE + (1 - FINAL_LEARNING_RATE_SHARE) * cosine
    )


def pretrain(model: LlamaForCausalLM, blocks: Iterator[torch.Tensor], steps: int) -> None:
    """Train in place on `steps` blocks, each read once."""
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.98), weight_decay=0.05, fused=True
    )
    started = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, steps)
        block = next(blocks)
        loss = model(input_ids=block, labels=block).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            seconds = time.monotonic() - started
            print(f"step {step}/{steps}  loss {loss.item():.3f}  {seconds:.0f} s", flush=True)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write weights and configuration, with no trace of where they were made."""
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
        max_new_tokens=32,
    )
    model.save_pretrained(folder)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{count} parameters -> {folder}")


def main() -> None:
    """Read the command line, pretrain, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--output", type=Path, default=MODEL_DIR)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    model = make_model(tokenizer)
    pretrain(model, make_blocks(tokenizer), options.steps)
    save(model, tokenizer, options.output)


if __name__ == "__main__":
    main()
