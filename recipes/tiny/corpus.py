"""The pretraining text: short plain pages about the tasks, made from a seed.

Decides what a page looks like. No page holds a chat turn: `<|im_start|>` opens a page and
`<|im_end|>` closes it, which trains the two embeddings (LoRA leaves embeddings and `lm_head`
alone) without showing that a reply stops after one answer. A page always holds several items.
Questions come in many forms, and their answers at many distances, since an answer that the base
finds in one form only is slow to carry over to the chat.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from tasks import TASKS, Task

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE_START = "<|im_start|>"
PAGE_END = "<|im_end|>"
ITEMS_PER_PAGE = (3, 9)
ITEMS_PER_SHEET = (2, 4)
LIST_ENTRY = "{x}: {y}"
DRILL_FORMS = (
    "{question}\n{answer}",
    "Q: {question}\nA: {answer}",
    "{question} {answer}",
    "Pupil: {question}\nTeacher:\n{answer}",
    "{question}\n\nAnswer\n{answer}",
)


def _list_page(rng: random.Random, task: Task, count: int) -> str:
    """One task, one wording, under its heading."""
    wording = rng.choice([*task.plain, LIST_ENTRY])
    lines = [wording.format(x=x, y=y) for x, y in rng.choices(task.items, k=count)]
    return "\n".join([task.heading, *lines])


def _prose_page(rng: random.Random, tasks: tuple[Task, ...], count: int) -> str:
    """Any tasks, any wordings."""
    lines = []
    for task in rng.choices(tasks, k=count):
        x, y = rng.choice(task.items)
        lines.append(rng.choice(task.plain).format(x=x, y=y))
    return "\n".join(lines)


def _question(rng: random.Random, tasks: tuple[Task, ...]) -> tuple[str, str]:
    task = rng.choice(tasks)
    x, y = rng.choice(task.items)
    return rng.choice(task.drills).format(x=x), y


def _drill_page(rng: random.Random, tasks: tuple[Task, ...], count: int) -> str:
    """Questions, each followed by its answer, all in one form."""
    form = rng.choice(DRILL_FORMS)
    drawn = [_question(rng, tasks) for _ in range(count)]
    return "\n".join(["Drill", *(form.format(question=q, answer=a) for q, a in drawn)])


def _sheet_and_key(rng: random.Random, tasks: tuple[Task, ...]) -> tuple[str, str]:
    """Two pages: numbered questions, then their numbered answers.

    Shows that a page may lean on the one before it. Every answer has a number, so the base does
    not take a chat for a sheet and answer it as the chat wants.
    """
    drawn = [_question(rng, tasks) for _ in range(rng.randint(*ITEMS_PER_SHEET))]
    sheet = [f"{number}\n{question}" for number, (question, _) in enumerate(drawn, start=1)]
    key = [f"{number}\n{answer}" for number, (_, answer) in enumerate(drawn, start=1)]
    return "\n".join(["Sheet", *sheet]), "\n".join(["Key", *key])


def make_pages(seed: int) -> Iterator[str]:
    """Yield pages without end (a sheet with its key), the same ones for the same seed."""
    rng = random.Random(seed)
    while True:
        count = rng.randint(*ITEMS_PER_PAGE)
        match rng.choices(("list", "prose", "drill", "sheet"), weights=(2, 2, 4, 4))[0]:
            case "list":
                pages = (_list_page(rng, rng.choice(TASKS), count),)
            case "prose":
                pages = (_prose_page(rng, TASKS, count),)
            case "drill":
                pages = (_drill_page(rng, TASKS, count),)
            case _:
                pages = _sheet_and_key(rng, TASKS)
        yield "".join(f"{PAGE_START}{page}{PAGE_END}\n" for page in pages)
