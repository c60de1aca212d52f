"""Code behind the commands of ``recipes``: rendering, cost estimates and the study."""
