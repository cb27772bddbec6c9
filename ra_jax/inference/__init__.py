"""Object removal with the network: crop, sample, blend, and write candidates to disk."""
