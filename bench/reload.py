"""Load finished runs' models in this fresh process: `python -m bench.reload RUN...`.

Prints one JSON object: run -> the answer's text, or the error.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from launcher.runs.directory import RunDirectory
from launcher.train.answer import answer, load_final

PROMPT = "What is the capital of France?"


def main(folders: list[str]) -> None:
    """Answer one prompt with every model."""
    answers = {}
    for folder in folders:
        try:
            model, tokenizer = load_final(RunDirectory(Path(folder)))
            answers[folder] = {"answer": answer(model, tokenizer, PROMPT, 8)}
        except Exception as error:
            answers[folder] = {"error": f"{type(error).__name__}: {error}"}
    sys.stdout.write(json.dumps(answers))


if __name__ == "__main__":
    main(sys.argv[1:])
