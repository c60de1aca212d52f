"""Code behind the commands of ``recipes``: rendering, cost estimates, smoke runs and the study."""
