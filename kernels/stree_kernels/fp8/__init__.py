"""Projections and experts whose weights are stored in FP8 with scales."""
