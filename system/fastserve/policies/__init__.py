"""FastServe's own policies, and how policies are found by name. `fastserve.scheduler` has what they are made of."""
