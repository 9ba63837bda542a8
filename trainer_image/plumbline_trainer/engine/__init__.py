"""What every training stage shares, once: packing, attention, log-probabilities, schedules, checkpoints, resume."""
