"""Whom a model serves worse, and what an update leaks."""
