"""From PyTorch to a verified bundle of portable graphs: torch lives here, and nowhere else."""
