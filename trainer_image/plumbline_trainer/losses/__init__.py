"""Losses as pure functions of tensors: shapes and the paper's equation stand in each docstring."""
