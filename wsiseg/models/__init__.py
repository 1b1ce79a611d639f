"""Networks: extractors, heads, segmenters and their files. Knows no slides and no outputs."""
