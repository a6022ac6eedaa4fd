"""Captions, pages and figures."""
