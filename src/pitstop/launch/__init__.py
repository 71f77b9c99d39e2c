"""Starts ranks, and machines that run them."""
