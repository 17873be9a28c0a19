"""Secrets that someone types are not written; what only looks like one is."""

from __future__ import annotations

import pytest

from launcher.errors import SpecError
from launcher.render.secrets import hide
from tests.render.test_slurm import render

SECRET = "do-not-write-me"


@pytest.mark.parametrize(
    "text",
    [
        f"sftlaunch --set 'slurm.before=[export WANDB_API_KEY={SECRET}]'",
        f"sftlaunch --set training.hub_token={SECRET}",
        f"sftlaunch --set 'slurm.directives={{export: \"HF_TOKEN={SECRET}\"}}'",
        f"sftlaunch --set docker.password: '{SECRET}'",
        f"sftlaunch --set x={SECRET}",  # the value of a variable, wherever it stands
    ],
)
def test_typed_secrets_are_hidden(text: str) -> None:
    assert SECRET not in hide(text, {"MY_TOKEN": SECRET})
    assert "***" in hide(text, {"MY_TOKEN": SECRET})


@pytest.mark.parametrize("token", ["hf_" + "a" * 34, "sk-" + "b" * 30, "ghp_" + "c" * 36])
def test_known_forms_are_hidden_anywhere(token: str) -> None:
    assert hide(f"sftlaunch --model {token}", {}) == "sftlaunch --model ***"


@pytest.mark.parametrize(
    "text",
    [
        "sftlaunch --set training.pad_token=<pad> --set training.max_length=8",
        "sftlaunch --set 'slurm.before=[export HF_TOKEN=$(cat /x)]'",
        "sftlaunch --set samples.max_new_tokens=5 --model org/tokenizer",
        "sftlaunch --set model.revision=0123456789abcdef0123456789abcdef01234567",
    ],
)
def test_other_words_stay(text: str) -> None:
    assert hide(text, {"HF_TOKEN": "", "A_TOKEN": "org"}) == text


@pytest.mark.parametrize(
    "slurm",
    [
        {"before": [f"export WANDB_API_KEY={SECRET}"]},
        {"directives": {"export": f"ALL,HF_TOKEN={SECRET}"}},
    ],
)
def test_a_script_that_would_hold_one_is_refused(slurm: dict[str, object]) -> None:
    with pytest.raises(SpecError, match="looks like a secret") as refusal:
        render(slurm)
    assert SECRET not in str(refusal.value)
    render({"before": ["export HF_TOKEN=$(cat ~/token)"]})
