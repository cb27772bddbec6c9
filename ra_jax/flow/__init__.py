"""Flow matching without the network: the path between data and noise, time steps, samplers and loss regions."""
