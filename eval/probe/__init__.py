"""Probes: which heads and channels matter, and why SEAL works (paper sections 3, 5.1 and 7, appendix E)."""
