"""Projections of a few rows, with norms, activations, residuals and experts."""
