"""Labelled and unlabelled images: what they are and how they are varied. Knows no networks."""
