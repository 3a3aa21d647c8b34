"""Activation ranges along trajectories, quantised graphs and the search for the cheapest recipe; no torch."""
