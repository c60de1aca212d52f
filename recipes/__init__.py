"""Recipes, the small model they can be tried on, and the demo."""
