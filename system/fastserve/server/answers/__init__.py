"""Answers to requests that generate: whole, or as a stream of events."""
