"""From points to tables: capacity, intervals, claims and targets."""
