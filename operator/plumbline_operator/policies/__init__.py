"""The decisions of `plan`, one subject a module: pure functions of values, with `now` as an argument."""
