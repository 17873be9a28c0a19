"""Reads runs: where they stand and what they printed. Changes nothing."""
