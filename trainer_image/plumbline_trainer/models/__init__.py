"""Models: loading, adapters, merging and saving. A policy is a model with its tokenizer and where it comes from."""
