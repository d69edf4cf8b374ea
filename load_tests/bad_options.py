"""Request options that a server must refuse, each with an error that names the option."""

from __future__ import annotations

from typing import Any

BAD_OPTIONS: tuple[tuple[str, Any], ...] = (
    ("max_tokens", 0),
    ("max_tokens", "many"),
    ("temperature", -1),
    ("top_p", 2.0),
    ("n", 1000),
    ("stop", [""]),
    ("logit_bias", "{"),
    ("seed", "x"),
    ("stop_token_ids", [10**9]),
    ("no_such_option", 1),
)
