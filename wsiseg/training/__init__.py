"""Fitting and measuring networks. The only room that changes weights."""
