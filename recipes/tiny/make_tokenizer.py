"""Train the byte-level BPE tokenizer and write it, with its chat template, into `model/`.

Decides the vocabulary. Digits stand alone, so arithmetic sees one token a digit. The pad token is
its own, not the end token: masking pads must not mask the end that the model has to learn.

Run: `python recipes/tiny/make_tokenizer.py` (seconds).
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from corpus import PAGE_END, PAGE_START, make_pages
from make_data import SYSTEM_PROMPTS
from tasks import TASKS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

MODEL_DIR = Path(__file__).parent / "model"
VOCABULARY_SIZE = 768
MAX_LENGTH = 512
PAD = "<|pad|>"
PAGES = 20_000

# The end token is inside the generation block: with assistant-only loss it is learned too.
CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}
{{- message['content'] + '<|im_end|>' }}
{%- endgeneration %}
{%- else %}
{{- message['content'] + '<|im_end|>' }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def training_text() -> list[str]:
    """Pages for the words and numbers, and chat wordings so that those do not fall into bytes."""
    chat = [wording.format(x="", y="") for task in TASKS for wording in task.chat]
    roles = ["system\n", "user\n", "assistant\n"]
    return [*islice(make_pages(seed=1), PAGES), *(chat + list(SYSTEM_PROMPTS) + roles) * 500]


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Return the trained tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[PAD, PAGE_START, PAGE_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=PAGE_END,
        additional_special_tokens=[PAGE_START],
        model_max_length=MAX_LENGTH,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


if __name__ == "__main__":
    tokenizer = train_tokenizer()
    tokenizer.save_pretrained(MODEL_DIR)
    print(f"{len(tokenizer)} tokens -> {MODEL_DIR}")
