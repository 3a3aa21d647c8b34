"""Between pictures and latents: decoders and encoders, one file a family, each a stage of its own."""
