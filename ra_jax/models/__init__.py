"""The networks: FLUX transformer, VAE, SigLIP + Redux, LoRA experts and their router, and their weight files."""
