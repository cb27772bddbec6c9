"""Loading and saving of weights in the file formats of diffusers and transformers."""
