"""Run configurations (YAML) and DeepSpeed configurations (JSON)."""
