"""What a placement needs and costs; one module for each objective, one interface (objective.py)."""
