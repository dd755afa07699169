"""From text to a plan: statistics of the dense model, allocation over its sites, budgets."""
