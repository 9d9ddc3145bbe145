"""Measure, predict, search: everything that decides how to speculate, and `stree-tune` itself."""
