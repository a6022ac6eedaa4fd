"""An engine in virtual time, or in real time behind a server. No torch."""
