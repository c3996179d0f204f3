"""Secrets among settings are hidden, also where they lie deep or inside a text; what is none stays."""

from __future__ import annotations

from typing import Any

import pytest

from qscope_trl.monitor.secrets import HIDDEN, without_secrets

TOKEN = "hf_" + "A1b2" * 8


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (
            {"hub_token": TOKEN, "api_key": "x", "password": ""},
            {"hub_token": HIDDEN, "api_key": HIDDEN, "password": ""},
        ),
        (
            {"model_init_kwargs": {"token": "x", "dtype": "bf16"}},
            {"model_init_kwargs": {"token": HIDDEN, "dtype": "bf16"}},
        ),
        ({"headers": [{"name": f"Bearer {TOKEN}"}]}, {"headers": [{"name": f"Bearer {HIDDEN}"}]}),
        ("https://me:pw@host/x", f"https://{HIDDEN}@host/x"),
        ({"token": True, "pad_token_id": 0, "key_length": 3}, {"token": True, "pad_token_id": 0, "key_length": 3}),
        ("sk-learn and hf_transfer", "sk-learn and hf_transfer"),
    ],
)
def test_secrets_are_hidden_and_nothing_else(given: Any, wanted: Any) -> None:
    assert without_secrets(given) == wanted
