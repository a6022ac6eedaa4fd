"""The engine's thread, and the streams of tokens between it and the event loop."""
