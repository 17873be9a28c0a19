"""Greedy generation from the model as it is wrapped, under every strategy.

All ranks take part: each answers its share, and where forwards are collective (FSDP,
ZeRO-3) ranks that are done go on with dummy steps until the last is (`synced_gpus`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from launcher.train.control import EvaluationStopped
from launcher.train.state import wrapped_type

GENERATION_BATCH = 32


def answers(
    trainer: Any, tokenizer: Any, prompts: Sequence[Any], max_new_tokens: int
) -> list[tuple[str, bool]]:
    """Each prompt's greedy answer, and whether it stopped with the end token.

    Args:
        trainer: the SFTTrainer, after its model was wrapped.
        tokenizer: with a chat template where prompts are messages.
        prompts: texts or lists of messages.
        max_new_tokens: upper bound of an answer's length in tokens.

    Returns:
        The same list on every rank, in the order of the prompts.

    Raises:
        EvaluationStopped: where a stop was asked for; looked at between batches.
    """
    if not prompts:
        return []
    from accelerate.utils import gather_object

    state = trainer.accelerator.state
    world, rank = state.num_processes, state.process_index
    share = -(-len(prompts) // world)
    # Every rank runs as many batches; the padding is dropped after the gather.
    mine = [prompts[min(rank * share + i, len(prompts) - 1)] for i in range(share)]
    found: list[tuple[str, bool]] = []
    with _model_for_generation(trainer) as (model, synced):
        for start in range(0, share, GENERATION_BATCH):
            trainer.heartbeat.beat()
            if trainer.ranks.stop_wanted():
                raise EvaluationStopped
            batch = mine[start : start + GENERATION_BATCH]
            found += _generate(model, tokenizer, batch, max_new_tokens, synced)
    gathered = gather_object(found) if world > 1 else found
    return list(gathered[: len(prompts)])


def render_prompt(tokenizer: Any, prompt: Any) -> str:
    """A prompt as the model reads it: messages through the chat template."""
    if isinstance(prompt, str):
        if tokenizer.chat_template is None:
            return prompt
        prompt = [{"role": "user", "content": prompt}]
    text: str = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return text


@contextlib.contextmanager
def _model_for_generation(trainer: Any) -> Iterator[tuple[Any, bool]]:
    """The module to call `generate` on, in eval mode, and whether its forwards are collective.

    ZeRO-3 gathers the whole model (TRL's own way): with its hooks on, the last forward
    leaves parameters in flight and the next training step fails (DeepSpeed 0.19). FSDP1
    gathers too; FSDP2 gathers layer by layer inside the forward.
    """
    import torch
    from trl.models import unwrap_model_for_generation

    wrapped = trainer.model_wrapped
    kind = wrapped_type(wrapped)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if kind == "FSDP1":
            from torch.distributed.fsdp import FullyShardedDataParallel

            stack.enter_context(
                FullyShardedDataParallel.summon_full_params(wrapped, writeback=False)
            )
        unwrapped = stack.enter_context(
            unwrap_model_for_generation(
                wrapped,
                trainer.accelerator,
                # Checkpointing is off while generating; without these it comes back reentrant.
                gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
            )
        )
        training = unwrapped.training
        unwrapped.eval()
        stack.callback(unwrapped.train, training)
        yield unwrapped, kind == "FSDP2"


def _generate(
    model: Any, tokenizer: Any, prompts: Sequence[Any], max_new_tokens: int, synced: bool
) -> list[tuple[str, bool]]:
    texts = [render_prompt(tokenizer, prompt) for prompt in prompts]
    inputs = tokenizer(
        texts,
        return_tensors="pt",
        padding=True,
        padding_side="left",
        add_special_tokens=tokenizer.chat_template is None,
        return_token_type_ids=False,
    ).to(model.device)
    tokens = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
        synced_gpus=synced,
    )
    new = tokens[:, inputs["input_ids"].shape[1] :].tolist()
    return [_cut_at_end(tokenizer, row) for row in new]


def _cut_at_end(tokenizer: Any, row: list[int]) -> tuple[str, bool]:
    stopped = tokenizer.eos_token_id in row
    if stopped:
        row = row[: row.index(tokenizer.eos_token_id)]
    return tokenizer.decode(row, skip_special_tokens=True).strip(), stopped
