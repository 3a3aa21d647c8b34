"""Text encoders, one file a family, under the names that transformers stores their weights by."""
