"""Which requests arrive, and when."""
