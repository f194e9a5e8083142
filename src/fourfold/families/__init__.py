"""Facts of an architecture that its Transformers config does not tell; torch-free."""
