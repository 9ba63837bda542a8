"""The contract of Plumbline: the kinds, the type checker, the run record, what trainer and operator exchange."""
