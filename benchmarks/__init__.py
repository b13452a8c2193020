"""Measurements: every number in the documentation comes from a command in here."""
