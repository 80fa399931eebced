"""One training step, decided purely: samples, schedule, slots, commit."""
