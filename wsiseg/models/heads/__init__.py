"""Heads: features of a window to class logits, one file each."""
