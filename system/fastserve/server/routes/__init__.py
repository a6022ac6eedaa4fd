"""The routes, by purpose: OpenAI's interface, operations, the live page."""
