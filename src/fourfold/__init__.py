"""Train and fine-tune language models from one config file."""
