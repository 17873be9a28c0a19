"""Decisions, pure: a spec and facts in, a `Plan` or a `Refusal` out. No file, no clock."""
