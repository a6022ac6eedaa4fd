"""What clients send: the fields of each request, which of them are supported, and their bounds."""
