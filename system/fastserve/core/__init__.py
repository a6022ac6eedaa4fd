"""Plain data and small tools that every other room uses: no torch, no engine, no policy."""
