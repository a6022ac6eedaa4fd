"""Who carries out an iteration: a simulation, or workers that compute. Torch is imported only by those that need it."""
