"""Whole pipelines as sources: the denoiser with its text encoders, tokenizers, autoencoder and conventions."""
