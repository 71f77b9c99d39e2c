"""Files: durable writes, the run directory and its records. No torch."""
