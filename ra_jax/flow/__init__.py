"""Flow matching apart from the network: the path between data and noise, time steps, samplers, regions."""
