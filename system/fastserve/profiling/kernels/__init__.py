"""Profiles from kernel tables that others measured: readers of their layouts, and what makes a profile of them."""
