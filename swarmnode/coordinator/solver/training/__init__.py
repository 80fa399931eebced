"""Steps of our own engine on uneven machines."""
