"""One module per stage type, each with `run(context) -> StageOutput`."""
