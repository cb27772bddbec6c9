"""Load and save weights in the file formats of diffusers and transformers."""
