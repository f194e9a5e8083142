"""Loading, quantising, adapting and running Transformers models."""
