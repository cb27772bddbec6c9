"""Around the network when a photo is edited: the window it sees, the way back into the photo, the candidates on disk."""
