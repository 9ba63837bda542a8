"""From files to rows to token ids."""
