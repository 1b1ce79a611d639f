"""A slide through a network: plan, read, encode, blend. Knows no formats, in or out."""
