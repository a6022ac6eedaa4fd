"""Plain data and small tools that all other packages use: no torch, no engine, no policy."""
