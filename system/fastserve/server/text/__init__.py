"""Between text and tokens: prompts in, generated tokens out one by one, and the texts that stop them."""
