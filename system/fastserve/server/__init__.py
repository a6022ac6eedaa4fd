"""The server: an engine behind OpenAI's HTTP interface."""
