"""The routes, by purpose: OpenAI's interface, the tokenizer, operations, pages."""
