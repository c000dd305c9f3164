"""`depthcut sweep`: models x plans x precisions from one YAML, in one table."""
