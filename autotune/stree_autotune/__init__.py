"""Measure, predict, search: everything that decides how to speculate, and `stree-tune` itself.

Rooms follow the way of the data: store, trace, cost, search, probe, live, then export, report and
share, and cli above them. Each room exports what others may use.
"""
