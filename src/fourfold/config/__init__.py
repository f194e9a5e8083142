"""The user's keys: their types, help, defaults, rules and the mapping of other tools' names."""
