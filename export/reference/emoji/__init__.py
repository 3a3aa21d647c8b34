"""A small text-to-image model of emoji: data, captions, networks and training."""
