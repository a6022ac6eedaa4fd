"""A model on several ranks: who holds what (`layout`, no torch), and how ranks talk to each other (`groups`)."""
