"""Evaluation: suites, judges, generation and statistics. The unit of every figure is the prompt."""
