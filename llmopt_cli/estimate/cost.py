"""Money: an hourly rate and a rate of tokens make a price per token. Knows no model and no catalogue."""

from __future__ import annotations


def usd_per_tokens(usd_per_hour: float, tokens_per_s: float, tokens: int = 1000) -> float:
    """Hourly rate x seconds per `tokens` / 3600. The rate is that of all GPUs which make the tokens together."""
    return usd_per_hour * (tokens / tokens_per_s) / 3600
