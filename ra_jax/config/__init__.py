"""The configuration of a training: its groups of settings, what contradicts, and where values come from."""
