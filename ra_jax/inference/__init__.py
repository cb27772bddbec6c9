"""Around the network when a photo is edited: the window it sees, the way back, the candidates on disk."""
