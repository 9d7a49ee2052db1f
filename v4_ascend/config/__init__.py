"""Configuration: the model, the topology file, and where each error is. No tensor library."""
