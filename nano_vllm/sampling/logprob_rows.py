"""How many rows of logits exist at the same time for log-probabilities."""

from __future__ import annotations

PROMPT_ROWS = 256
"""Of a prompt, in the model's dtype."""
ROWS_AT_ONCE = 32
"""In float64: else the last bits of a sum would depend on how many rows there are."""
