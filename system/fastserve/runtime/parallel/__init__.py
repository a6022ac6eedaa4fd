"""Communication: between the engine and its ranks (`channel`), and among the ranks (`groups`)."""
