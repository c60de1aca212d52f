"""Plugins for Axolotl."""
