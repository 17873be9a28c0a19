"""The pretraining text: short plain pages about the tasks, made from a seed.

Decides what a page looks like. No page holds a chat turn: `<|im_start|>` opens a page and
`<|im_end|>` closes it, which trains the two embeddings (LoRA leaves embeddings and `lm_head`
alone) without showing that a reply stops after one answer. A page always holds several items.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from tasks import Task, load_tasks

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE_START = "<|im_start|>"
PAGE_END = "<|im_end|>"
ITEMS_PER_PAGE = (3, 9)


def _list_page(rng: random.Random, task: Task, count: int) -> str:
    """One task, one wording, under its heading."""
    wording = rng.choice(task.plain)
    lines = [wording.format(x=x, y=y) for x, y in rng.choices(task.items, k=count)]
    return "\n".join([task.heading, *lines])


def _prose_page(rng: random.Random, tasks: tuple[Task, ...], count: int) -> str:
    """Any tasks, any wordings."""
    lines = []
    for task in rng.choices(tasks, k=count):
        x, y = rng.choice(task.items)
        lines.append(rng.choice(task.plain).format(x=x, y=y))
    return "\n".join(lines)


def _drill_page(rng: random.Random, tasks: tuple[Task, ...], count: int) -> str:
    """Questions, each with its answer on a line of its own."""
    lines = ["Drill"]
    for task in rng.choices(tasks, k=count):
        x, y = rng.choice(task.items)
        lines += [rng.choice(task.drills).format(x=x), y]
    return "\n".join(lines)


def make_pages(seed: int) -> Iterator[str]:
    """Yield pages without end, the same ones for the same seed."""
    rng = random.Random(seed)
    tasks = load_tasks()
    while True:
        count = rng.randint(*ITEMS_PER_PAGE)
        match rng.choices(("list", "prose", "drill"), weights=(2, 2, 5))[0]:
            case "list":
                page = _list_page(rng, rng.choice(tasks), count)
            case "prose":
                page = _prose_page(rng, tasks, count)
            case _:
                page = _drill_page(rng, tasks, count)
        yield f"{PAGE_START}{page}{PAGE_END}\n"
