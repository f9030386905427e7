"""The workbench: four linked pictures of one attention layer."""
