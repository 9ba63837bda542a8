"""What preflight finds out before anything is asked of an accelerator."""
