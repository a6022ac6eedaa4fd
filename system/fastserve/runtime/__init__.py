"""Everything that needs torch: kernels, models, workers, ranks and the executors that drive them."""
