"""The release gate: policies, parity and cost against a baseline, reports and an exit code."""
