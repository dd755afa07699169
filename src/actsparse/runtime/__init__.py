"""A sparsified model at work: its modules, the swap, neurons chosen per prompt, the native decode step, generation."""
