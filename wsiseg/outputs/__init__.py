"""The files that people open, made from a canvas. Knows no slides and no networks."""
