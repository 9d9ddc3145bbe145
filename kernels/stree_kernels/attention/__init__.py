"""Attention over a committed cache and a token tree."""
