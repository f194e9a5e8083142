"""Where the rewards of generated completions come from: Python functions, a reward model, or an HTTP endpoint."""
