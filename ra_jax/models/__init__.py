"""The networks: FLUX transformer, VAE, SigLIP + Redux, LoRA experts and their router."""
