"""Keys and files of other tools, mapped to Fourfold's own or refused with a reason."""
