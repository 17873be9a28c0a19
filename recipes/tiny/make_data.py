"""Write the conversations of the fine-tune: `data/train.jsonl` and `data/eval.jsonl`.

Decides what is held out: facts, not only wordings. No training conversation states a held-out fact
in any form, so a right answer to one comes from pretraining and not from this data.

Run: `python recipes/tiny/make_data.py` (seconds).
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from tasks import TASKS, Task

DATA_DIR = Path(__file__).parent / "data"
SEED = 7
TRAIN_PER_TASK = 300
EVAL_PER_TASK = 25
EVAL_FACT_SHARE = 0.2
SYSTEM_SHARE = 0.15
SECOND_TURN_SHARE = 0.1
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "Answer in one word or number.",
    "You are a patient teacher. Keep answers short.",
)

Item = tuple[str, str]
Message = dict[str, str]


def fact_behind(item: Item) -> str:
    """Name the fact that an item states: its words and its answer's, in any order.

    `hot` and `cold`, `2 + 3` and `3 + 2`, or two orders of the same digits state one fact.
    """
    return " ".join(sorted(" ".join(item).split()))


def split_items(task: Task, rng: random.Random) -> tuple[list[Item], list[Item]]:
    """Return (training items, held-out items), which share no fact."""
    facts = sorted({fact_behind(item) for item in task.items})
    held_out = set(rng.sample(facts, round(len(facts) * EVAL_FACT_SHARE)))
    return (
        [item for item in task.items if fact_behind(item) not in held_out],
        [item for item in task.items if fact_behind(item) in held_out],
    )


def _turn(task: Task, item: Item, rng: random.Random) -> list[Message]:
    x, y = item
    return [
        {"role": "user", "content": rng.choice(task.chat).format(x=x)},
        {"role": "assistant", "content": y},
    ]


def _opening(rng: random.Random) -> list[Message]:
    if rng.random() < SYSTEM_SHARE:
        return [{"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}]
    return []


def make_train(items: dict[Task, list[Item]], rng: random.Random) -> list[dict[str, object]]:
    """Draw conversations with replacement; a few have a second turn from any task."""
    rows: list[dict[str, object]] = []
    for task, choices in items.items():
        for _ in range(TRAIN_PER_TASK):
            messages = _opening(rng) + _turn(task, rng.choice(choices), rng)
            if rng.random() < SECOND_TURN_SHARE:
                other = rng.choice(list(items))
                messages += _turn(other, rng.choice(items[other]), rng)
            rows.append({"messages": messages, "task": task.name})
    rng.shuffle(rows)
    return rows


def make_eval(items: dict[Task, list[Item]], rng: random.Random) -> list[dict[str, object]]:
    """Draw single-turn conversations, every question different."""
    rows: list[dict[str, object]] = []
    for task, choices in items.items():
        # Each wording of each item is one question; few items serve twice, in two wordings.
        questions = [(item, wording) for item in choices for wording in task.chat]
        for (x, y), wording in rng.sample(questions, EVAL_PER_TASK):
            asked = {"role": "user", "content": wording.format(x=x)}
            messages = [*_opening(rng), asked, {"role": "assistant", "content": y}]
            rows.append({"messages": messages, "task": task.name})
    rng.shuffle(rows)
    return rows


def write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    """Write one JSON object a line."""
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} conversations -> {path}")


def main() -> None:
    """Split the items of every task, then write both files."""
    rng = random.Random(SEED)
    splits = {task: split_items(task, rng) for task in TASKS}
    train = make_train({task: seen for task, (seen, _) in splits.items()}, rng)
    held_out = make_eval({task: unseen for task, (_, unseen) in splits.items()}, rng)
    write_rows(DATA_DIR / "train.jsonl", train)
    write_rows(DATA_DIR / "eval.jsonl", held_out)


if __name__ == "__main__":
    main()
