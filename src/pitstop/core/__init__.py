"""The plan of a run, free of torch: recipe, schedules, timeline, order, randomness."""
