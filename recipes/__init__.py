"""Recipes, and the programs that write, launch and measure them."""
