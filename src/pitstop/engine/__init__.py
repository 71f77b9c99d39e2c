"""The training engine: the only place where plan, data, model and device meet."""
