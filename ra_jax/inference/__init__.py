"""Photo editing with the network: crops, sampling, blending, and the candidates written to disk."""
